use super::*;
use std::time::Duration;

#[test]
fn samples_of_a_metric_stand_together() {
    let mut out = Exposition::default();
    for device in ["disk0", "disk1"] {
        out.count("a_total", "First.", &[("device", device)], 1);
        out.gauge("b", "Second.", &[("device", device)], 0.5);
    }
    assert_eq!(
        out.text(),
        "# HELP a_total First.\n# TYPE a_total counter\na_total{device=\"disk0\"} 1\na_total{device=\"disk1\"} 1\n\
         # HELP b Second.\n# TYPE b gauge\nb{device=\"disk0\"} 0.5\nb{device=\"disk1\"} 0.5\n"
    );
}

#[test]
fn label_values_are_escaped() {
    let mut out = Exposition::default();
    out.gauge("g", "A \\ and\na line.", &[("x", "a\"b\\c\nd")], 1.0);
    assert_eq!(out.text(), "# HELP g A \\\\ and\\na line.\n# TYPE g gauge\ng{x=\"a\\\"b\\\\c\\nd\"} 1\n");
}

#[test]
fn a_histogram_is_cumulative_and_ends_with_all() {
    let (mut out, h) = (Exposition::default(), Histogram::default());
    for us in [1, 7, 7, 20_000_000] {
        h.record(Duration::from_micros(us));
    }
    out.histogram("t_seconds", "Times.", &[], &h);
    let text = out.text();
    let lines: Vec<&str> = text.lines().skip(2).collect();
    assert_eq!(lines[0], "t_seconds_bucket{le=\"0.000005\"} 1");
    assert_eq!(lines[1], "t_seconds_bucket{le=\"0.00001\"} 3");
    assert_eq!(lines[lines.len() - 4], "t_seconds_bucket{le=\"10\"} 3");
    assert_eq!(
        lines[lines.len() - 3..],
        ["t_seconds_bucket{le=\"+Inf\"} 4", "t_seconds_sum 20.000015", "t_seconds_count 4"]
    );
}
