use super::*;

#[test]
fn columns_are_aligned() {
    let rows = vec![vec!["what".to_owned(), "n".into()], vec!["a".into(), "10".into()]];
    assert_eq!(table(&rows), "what   n\n--------\na     10\n");
}

#[test]
fn a_plot_fits_its_width_and_shows_a_dip() {
    let points: Vec<(f64, f64)> = (0..100).map(|i| (f64::from(i) / 10.0, if i == 50 { 0.0 } else { 200.0 })).collect();
    let text = plot("MB/s", &points, &[(5.0, "ported"), (9.9, "a mark with a rather long text")]);
    assert!(text.lines().all(|l| l.chars().count() <= WIDTH), "{text}");
    assert!(text.contains("200 |###") && text.contains("^ ported"), "{text}");
    assert!(text.lines().any(|l| l.contains("text ^")), "{text}");
    assert!(plot("x", &[], &[]).contains("nothing"));
}

#[test]
fn medians_and_percentiles() {
    assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    assert_eq!(percentile(&[5.0, 1.0, 4.0, 2.0, 3.0], 99), 5.0);
    assert_eq!((median(&[]), percentile(&[], 99), percentile(&[7.0], 1)), (0.0, 0.0, 7.0));
}
