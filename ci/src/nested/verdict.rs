//! What the outer machine's init prints, as events: lines that begin with `@@` among all the others.
//!
//! Always true: a line in any other form is an ordinary line of the console, whatever a guest printed in it; an end counts only
//! for the scenario that has begun.
use std::time::Duration;

/// How a scenario ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should.
    Passed,
    /// It could not be tried, because…
    Skipped(String),
    /// It did not hold, because…
    Failed(String),
}

/// Something the machine said.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It is up.
    Up,
    /// It cannot run scenarios.
    Broken(String),
    /// A scenario begins.
    Begin(String),
    /// A figure of it.
    Note(String),
    /// It ended after that time.
    End(String, Verdict, Duration),
}

/// The event in a line, if it is one.
pub fn event(line: &str) -> Option<Event> {
    let words = line.trim_end().strip_prefix("@@ ")?;
    let (kind, rest) = words.split_once(' ').unwrap_or((words, ""));
    Some(match kind {
        "up" => Event::Up,
        "broken" => Event::Broken(rest.to_owned()),
        "begin" => Event::Begin(rest.to_owned()),
        "note" => Event::Note(rest.split_once(' ')?.1.to_owned()),
        "end" => {
            let mut parts = rest.splitn(4, ' ');
            let (name, how, seconds) = (parts.next()?, parts.next()?, parts.next()?);
            let reason = parts.next().unwrap_or("no reason given").to_owned();
            let verdict = match how {
                "ok" => Verdict::Passed,
                "skip" => Verdict::Skipped(reason),
                "fail" => Verdict::Failed(reason),
                _ => return None,
            };
            Event::End(name.to_owned(), verdict, Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_the_init_script_are_understood() {
        assert_eq!(event("@@ up\r"), Some(Event::Up));
        assert_eq!(event("@@ begin boot"), Some(Event::Begin("boot".into())));
        assert_eq!(event("@@ note boot up after 3 s"), Some(Event::Note("up after 3 s".into())));
        let end = |verdict| Some(Event::End("net".into(), verdict, Duration::from_millis(12_500)));
        assert_eq!(event("@@ end net ok 12.5"), end(Verdict::Passed));
        assert_eq!(event("@@ end net fail 12.5 no reply"), end(Verdict::Failed("no reply".into())));
        assert_eq!(event("@@ end net skip 12.5 no vhost-net"), end(Verdict::Skipped("no vhost-net".into())));
    }

    #[test]
    fn other_lines_are_none() {
        for line in [
            "",
            "@@",
            "@@ end net",
            "@@ end net ok",
            "@@ end net ok -1",
            "@@ end net maybe 1",
            " @@ up",
            "@@ note boot",
        ] {
            assert_eq!(event(line), None, "{line}");
        }
    }
}
