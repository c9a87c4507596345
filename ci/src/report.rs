//! What a person reads: tables, a plot of a series in the terminal, progress.
//!
//! Always true: no colours and no line wider than [`WIDTH`], so that it reads the same in a log.
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

/// Widest line.
pub const WIDTH: usize = 78;
const PLOT_HEIGHT: usize = 8;
/// Left of the plot: the axis labels.
const PLOT_MARGIN: usize = 9;
/// A log gets a line of progress this often.
const LOG_PERIOD: Duration = Duration::from_secs(5);
const TERMINAL_PERIOD: Duration = Duration::from_millis(200);

/// Rows of cells as aligned columns, the first line being the head. Columns after the first are right-aligned.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (i, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let width = widths[c];
            let _ = if c == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        let _ = writeln!(out, "{}", line.trim_end());
        if i == 0 {
            let _ = writeln!(out, "{}", "-".repeat(widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1)));
        }
    }
    out
}

/// A series (seconds, value) as bars over time; `marks` are written below the axis at their seconds.
pub fn plot(title: &str, points: &[(f64, f64)], marks: &[(f64, &str)]) -> String {
    let columns = WIDTH - PLOT_MARGIN;
    let end = points.iter().map(|p| p.0).chain(marks.iter().map(|m| m.0)).fold(0.0, f64::max);
    let mut out = format!("{title}\n");
    if points.is_empty() || end <= 0.0 {
        return out + "  (nothing measured)\n";
    }
    let column = |x: f64| ((x / end * columns as f64) as usize).min(columns - 1);
    // Mean of the points of a column; a column without one goes on as the one before.
    let mut sums = vec![(0.0, 0u32); columns];
    for (x, y) in points {
        let sum = &mut sums[column(*x)];
        *sum = (sum.0 + y, sum.1 + 1);
    }
    let mut last = 0.0;
    let bars: Vec<f64> = sums
        .iter()
        .map(|(sum, n)| {
            if *n > 0 {
                last = sum / f64::from(*n);
            }
            last
        })
        .collect();
    let top = bars.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    for row in (0..PLOT_HEIGHT).rev() {
        let label = if row + 1 == PLOT_HEIGHT {
            format!("{top:.0}")
        } else if row == 0 {
            "0".into()
        } else {
            String::new()
        };
        let level = |y: f64| (y / top * PLOT_HEIGHT as f64 * 2.0).round() as usize;
        let cell = |y: &f64| match level(*y).saturating_sub(row * 2) {
            0 => ' ',
            1 => '.',
            _ => '#',
        };
        let line: String = bars.iter().map(cell).collect();
        let _ = writeln!(out, "{label:>7} |{}", line.trim_end());
    }
    let _ = writeln!(out, "{:>7} +{}", "", "-".repeat(columns - 1));
    let seconds = format!("{end:.1} s");
    let _ = writeln!(out, "{:>7}  0{seconds:>width$}", "", width = columns - 2);
    for (x, text) in marks {
        let at = column(*x);
        // A long text goes to the left of its mark.
        let line = if at + text.len() + 2 > columns {
            format!("{:>width$} ^", text, width = at.saturating_sub(1))
        } else {
            format!("{:>at$}^ {text}", "")
        };
        let _ = writeln!(out, "{:>7}  {line}", "");
    }
    out
}

/// The median; 0 for nothing.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50)
}

/// A percentile (nearest rank); 0 for nothing.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if percent == 50 && !sorted.is_empty() && sorted.len().is_multiple_of(2) {
        return (sorted[sorted.len() / 2 - 1] + sorted[sorted.len() / 2]) / 2.0;
    }
    sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Progress of a long step on standard error: one changing line on a terminal, a line now and then in a log.
pub struct Progress {
    what: String,
    begin: Instant,
    shown: Instant,
    terminal: bool,
}

impl Progress {
    /// Announces the step.
    pub fn start(what: &str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let now = Instant::now();
        eprint!("{what} …{}", if terminal { "" } else { "\n" });
        let _ = std::io::stderr().flush();
        Progress { what: what.to_owned(), begin: now, shown: now, terminal }
    }

    /// Says how far it is, not too often.
    pub fn update(&mut self, how_far: &str) {
        let period = if self.terminal { TERMINAL_PERIOD } else { LOG_PERIOD };
        if self.shown.elapsed() < period {
            return;
        }
        self.shown = Instant::now();
        if self.terminal {
            eprint!("\r\x1b[K{} … {how_far}", self.what);
        } else {
            eprintln!("{} … {how_far}", self.what);
        }
        let _ = std::io::stderr().flush();
    }

    /// Ends it with its result.
    pub fn done(self, result: &str) {
        let seconds = self.begin.elapsed().as_secs_f64();
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        let separator = if result.is_empty() { "" } else { ": " };
        eprintln!("{start}{}{separator}{result} ({seconds:.1} s)", self.what);
    }
}

#[cfg(test)]
#[path = "report/tests.rs"]
mod tests;
