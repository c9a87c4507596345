//! Verdicts as lines on the terminal, in the form of Rust's tests, and their sum.
use super::{Parts, Report, Scenario, Verdict};
use anyhow::Result;
use std::fmt;

/// How many scenarios ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// As they should.
    pub passed: usize,
    /// They did not hold.
    pub failed: usize,
    /// Could not be tried.
    pub skipped: usize,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs scenarios, prints a line for each and quotes the consoles of those that failed.
pub fn run(scenarios: &[&'static Scenario], parts: &Parts, live: bool) -> Result<Totals> {
    let reports = super::run(scenarios, parts, live, |report| print!("{}", text(report, !live)))?;
    let count = |passes: fn(&Verdict) -> bool| reports.iter().filter(|r| passes(&r.verdict)).count();
    Ok(Totals {
        passed: count(|v| *v == Verdict::Passed),
        failed: count(|v| matches!(v, Verdict::Failed(_))),
        skipped: count(|v| matches!(v, Verdict::Skipped(_))),
    })
}

/// The lines for one, with its consoles if it failed and they are asked for.
fn text(report: &Report, consoles: bool) -> String {
    let seconds = report.took.as_secs_f64();
    let mut text = match &report.verdict {
        Verdict::Passed => format!("test nested::{} ... ok ({seconds:.1} s)\n", report.name),
        Verdict::Skipped(why) => format!("test nested::{} ... ignored, {why}\n", report.name),
        Verdict::Failed(why) => format!("test nested::{} ... FAILED ({seconds:.1} s): {why}\n", report.name),
    };
    for note in &report.notes {
        text.push_str(&format!("    {note}\n"));
    }
    if consoles && matches!(report.verdict, Verdict::Failed(_)) {
        for line in report.console.lines() {
            text.push_str(&format!("    | {}\n", line.trim_end()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_failure_quotes_the_console() {
        let report = |verdict| Report {
            name: "boot",
            verdict,
            took: Duration::from_millis(1500),
            notes: vec!["up after 3 s".into()],
            console: "first\nsecond\n".into(),
        };
        let passed = "test nested::boot ... ok (1.5 s)\n    up after 3 s\n";
        assert_eq!(text(&report(Verdict::Passed), true), passed);
        let failed = text(&report(Verdict::Failed("no disk".into())), true);
        assert!(failed.contains("FAILED (1.5 s): no disk\n") && failed.ends_with("    | first\n    | second\n"));
        assert!(!text(&report(Verdict::Failed("no disk".into())), false).contains("second"));
    }
}
