//! The commands of a page of the documentation, as a reader would type them, and what the page says they print.
//!
//! A fenced block counts if the line before it is a mark, which no reader sees: `<!-- step: run -->`. Kinds: `prepare` is for the
//! reader alone (programs to install); `make` is run once on the machine that tests; `run` in the emulated machine, all in one shell;
//! `type` is standard input of the `run` before; `shows` is all the `run` before prints, with `…` for what differs. Always true:
//! a page is taken whole or refused with the line; nothing here runs anything.

use std::fmt;

/// Something a reader does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Commands.
    pub run: String,
    /// What is typed while they run.
    pub typed: Option<String>,
    /// What they print.
    pub shows: Option<String>,
}

/// The steps of a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Commands that make what the others need.
    pub make: String,
    /// The others, in order.
    pub run: Vec<Step>,
}

/// What is wrong with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where, from 1.
    pub line: usize,
    /// What.
    pub what: &'static str,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

impl std::error::Error for Mistake {}

const MARK: &str = "<!-- step: ";
const MARK_END: &str = " -->";
const FENCE: &str = "```";
/// What differs from one run to the next.
const ANYTHING: char = '…';

/// The steps of a page in Markdown.
pub fn steps(page: &str) -> Result<Steps, Mistake> {
    let mut steps = Steps::default();
    let mut lines = page.lines().enumerate().map(|(i, text)| (i + 1, text));
    while let Some((line, text)) = lines.next() {
        let Some(kind) = text.strip_prefix(MARK) else { continue };
        let wrong = |what| Mistake { line, what };
        let kind = kind.strip_suffix(MARK_END).ok_or(wrong("a mark does not end"))?;
        if !lines.next().is_some_and(|(_, text)| text.starts_with(FENCE)) {
            return Err(wrong("no block begins behind the mark"));
        }
        let mut block = String::new();
        loop {
            match lines.next() {
                Some((_, FENCE)) => break,
                Some((_, text)) => block.extend([text, "\n"]),
                None => return Err(wrong("the block does not end")),
            }
        }
        let last = steps.run.last_mut();
        match (kind, last) {
            ("prepare", _) => {}
            ("make", _) => steps.make.push_str(&block),
            ("run", _) => steps.run.push(Step { run: block, ..Step::default() }),
            ("type", Some(step)) if step.typed.is_none() && step.shows.is_none() => step.typed = Some(block),
            ("shows", Some(step)) if step.shows.is_none() => step.shows = Some(block),
            ("type" | "shows", _) => return Err(wrong("there is no step it belongs to")),
            _ => return Err(wrong("an unknown kind of step")),
        }
    }
    Ok(steps)
}

/// A pattern of bash for exactly this text, where [`ANYTHING`] is any. Without line ends at its end, as `$(…)` has it.
pub fn pattern(shows: &str) -> String {
    let mut pattern = String::new();
    for c in shows.trim_end_matches('\n').chars() {
        match c {
            ANYTHING => pattern.push('*'),
            '\n' => pattern.push(c),
            c if c.is_alphanumeric() || !c.is_ascii() => pattern.push(c),
            c => pattern.extend(['\\', c]),
        }
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_taken_by_their_marks() {
        let page = "# Page\n\n<!-- step: prepare -->\n```sh\nget it\n```\n<!-- step: make -->\n```sh\nmake it\n```\n```sh\nnot it\n```\n\
            <!-- step: run -->\n```sh\nuse it\nagain\n```\n<!-- step: type -->\n```\nkeys\n```\ntext\n<!-- step: shows -->\n```\nit…\n```\n\
            <!-- step: run -->\n```sh\nend\n```\n";
        let first = Step { run: "use it\nagain\n".into(), typed: Some("keys\n".into()), shows: Some("it…\n".into()) };
        let last = Step { run: "end\n".into(), ..Step::default() };
        assert_eq!(steps(page), Ok(Steps { make: "make it\n".into(), run: vec![first, last] }));
    }

    #[test]
    fn mistakes_are_named() {
        for (page, line, what) in [
            ("\n<!-- step: run -->\n\n```sh\n```\n", 2, "no block begins"),
            ("<!-- step: run -->\n```sh\nx\n", 1, "does not end"),
            ("<!-- step: run\n```sh\nx\n```\n", 1, "mark does not end"),
            ("<!-- step: shows -->\n```\nx\n```\n", 1, "no step it belongs to"),
            ("<!-- step: walk -->\n```\nx\n```\n", 1, "unknown kind"),
        ] {
            let mistake = steps(page).unwrap_err();
            assert!(mistake.line == line && mistake.what.contains(what), "{mistake}");
        }
    }

    #[test]
    fn a_pattern_takes_nothing_but_what_was_left_out() {
        assert_eq!(pattern("a*[b]\n…c d\n"), "a\\*\\[b\\]\n*c\\ d");
    }

    #[test]
    fn every_block_of_the_first_steps_has_a_mark() {
        let page = super::super::first_steps::PAGE;
        let section = page.split("\n## ").find(|s| s.starts_with("First steps\n")).unwrap();
        let steps = steps(section).unwrap();
        assert!(!steps.make.is_empty() && steps.run.len() > 5 && steps.run[0].typed.is_some());
        let lines: Vec<&str> = section.lines().collect();
        let fences: Vec<usize> = (0..lines.len()).filter(|i| lines[*i].starts_with(FENCE)).collect();
        for open in fences.iter().step_by(2) {
            assert!(lines[open - 1].starts_with(MARK), "{}", lines[*open + 1]);
        }
    }
}
