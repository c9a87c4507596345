//! The scenarios of the nested test bed as tests, with a report in the form of Rust's own harness: `cargo xtask test` runs them and
//! adds them up. `cargo xtask test nested` runs them alone.
use std::process::ExitCode;
use xtask::artifacts::Artifacts;
use xtask::nested::{self, Parts, report};
use xtask::{cleanup, setup};

fn main() -> ExitCode {
    // Options of Rust's harness (--nocapture and the like) mean nothing here; the first word is the filter.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filter = arguments.iter().find(|a| !a.starts_with('-')).map(String::as_str);
    let scenarios: Vec<_> =
        nested::ALL.iter().filter(|s| filter.is_none_or(|f| format!("nested::{}", s.name).contains(f))).collect();
    if arguments.iter().any(|a| a == "--list") {
        scenarios.iter().for_each(|s| println!("nested::{}: test", s.name));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", scenarios.len());
    if scenarios.is_empty() {
        println!("\ntest result: ok. 0 passed; 0 failed; 0 ignored");
        return ExitCode::SUCCESS;
    }
    let outcome = cleanup::install_handler()
        .and_then(|()| setup::check_root())
        .and_then(|()| Artifacts::find())
        .and_then(|artifacts| report::run(&scenarios, &Parts::from(artifacts), false));
    match outcome {
        Ok(t) => {
            let word = if t.failed == 0 { "ok" } else { "FAILED" };
            println!("\ntest result: {word}. {} passed; {} failed; {} ignored", t.passed, t.failed, t.skipped);
            if t.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            println!("error: {e:#}\n\ntest result: FAILED. 0 passed; {} failed; 0 ignored", scenarios.len());
            ExitCode::FAILURE
        }
    }
}
