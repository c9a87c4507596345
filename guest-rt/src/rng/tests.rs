use super::*;

/// RFC 7539, section 2.3.2, with its nonce and counter laid into our 64-bit counter and a zero nonce elsewhere: the
/// all-zero vector of the original ChaCha20 test set.
#[test]
fn the_permutation_is_chacha20() {
    let block = chacha20(&[0; 8], 0);
    assert_eq!(block[..4], [0xade0_b876, 0x903d_f1a0, 0xe56a_5d40, 0x28bd_8653]);
    assert_eq!(block[15], 0x8665_eeb2);
}

#[test]
fn seeds_matter_and_output_does_not_repeat() {
    let draw = |seed: &[u8]| {
        let mut r = Rng::from_seed(seed);
        (0..1000).map(|_| r.next_u64()).collect::<Vec<_>>()
    };
    let (a, b, c) = (draw(b"a"), draw(b"b"), draw(b"a"));
    assert_eq!(a, c);
    assert_ne!(a, b);
    let distinct: std::collections::HashSet<_> = a.iter().chain(&b).collect();
    assert_eq!(distinct.len(), 2000);
    let ones: u32 = a.iter().map(|v| v.count_ones()).sum();
    assert!((31_000..33_000).contains(&ones), "{ones} of 64000 bits");
}

#[test]
fn entropy_is_mixed_into_what_was_there() {
    let mut one = Rng::from_seed(b"same");
    let mut two = Rng::from_seed(b"same");
    two.mix(&[1]);
    assert_ne!(one.next_u64(), two.next_u64());
}

#[test]
fn copies_of_a_vm_draw_other_numbers_at_once() {
    // What either draws after it was copied in the same state, at the first draw and in the middle of a block.
    let copy = |drawn: usize, entropy: u8| {
        seed_for_test(b"template");
        let before: Vec<_> = (0..drawn).map(|_| random_u32()).collect();
        source::ENTROPY.set([entropy; 32]);
        time::source::GENERATION.set(time::generation() + 1);
        (before, (0..100).map(|_| random_u32()).collect::<Vec<_>>())
    };
    for drawn in [0, 1, 5, 8] {
        let ((before, a), (same, b)) = (copy(drawn, 1), copy(drawn, 2));
        assert_eq!(before, same);
        assert!(a.iter().zip(&b).all(|(a, b)| a != b), "after {drawn} numbers");
    }
}
