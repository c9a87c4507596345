//! The search through all states, and how each ends.
use super::State;
use migration::message::Ownership;
use std::collections::{HashMap, HashSet, VecDeque};

/// More states than this: the model has grown beyond what a test should take.
const STATES_MAX: usize = 8_000_000;

/// How a state ends when it heals.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct End {
    pub(crate) ported: bool,
    pub(crate) resumed: bool,
    pub(crate) unknown: bool,
    pub(crate) untold: bool,
    pub(crate) taken_away: bool,
}

/// How many states of a search end how.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    pub(crate) states: usize,
    pub(crate) ported: u64,
    pub(crate) resumed: u64,
    pub(crate) unknown: u64,
    pub(crate) untold: u64,
    pub(crate) taken_away: u64,
}

pub(crate) fn search_from(first: &State, ownership: Ownership) -> Ends {
    let mut seen = HashSet::new();
    let mut todo = VecDeque::from([first.clone()]);
    seen.insert(hash(first));
    let mut ends = Ends::default();
    let mut known = HashMap::new();
    while let Some(state) = todo.pop_front() {
        state.check(ownership);
        let end = state.clone().heal(ownership, &mut known);
        ends.ported += u64::from(end.ported);
        ends.resumed += u64::from(end.resumed);
        ends.unknown += u64::from(end.unknown);
        ends.untold += u64::from(end.untold);
        ends.taken_away += u64::from(end.taken_away);
        for next in state.successors() {
            if seen.insert(hash(&next)) {
                assert!(seen.len() <= STATES_MAX, "the model has outgrown the test");
                todo.push_back(next);
            }
        }
    }
    ends.states = seen.len();
    println!("{ownership:?}, heir {}, {:?}: healed: {ends:?}", first.heir, first.lives);
    ends
}

/// 128 bits of a state instead of the state: two states share one with a probability below 10^-24.
pub(crate) fn hash(state: &State) -> u128 {
    use std::hash::Hash;
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    state.hash(&mut hasher);
    hasher.digest128()
}
