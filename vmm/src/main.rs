//! The `vmm` binary: one process, one VM; and `vmm ctl`, which tells such a process what to do.
//!
//! Order of things: everything that can be wrong with the command line is said first; then the control socket is taken,
//! then the VM is built and runs on its own threads; this thread serves the control interface until the VM ends, a signal comes
//! or a shutdown is asked for.

mod arbiter;
mod ctl;
mod keys;
mod release;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use tokio::signal::unix::{SignalKind, signal};
use vmm::api;
use vmm::boot::info::OwnerId;
use vmm::config::cli::{Args, Order};
use vmm::control::Control;
use vmm::port::{self, Engine, faults};
use vmm::sandbox::{self, Kind};
use vmm::socket_file::{SocketFile, SocketName};
use vmm::stats::{self, Stats};
use vmm::vcpu::End;

/// Exit status for a wrong configuration or command line.
const STATUS_USAGE: u8 = 2;
/// Exit status when the VM could not be built.
const STATUS_FAILED: u8 = 1;
/// Everything in this process is small; one malloc arena is enough for its three threads.
const MALLOC_ARENAS: libc::c_int = 1;

/// KVM virtual machine monitor for storage guests.
#[derive(Debug, Parser)]
#[command(name = "vmm", version, args_conflicts_with_subcommands = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    sandbox: sandbox::Options,
    #[command(flatten)]
    faults: faults::PortFaults,
    #[command(subcommand)]
    command: Option<Command>,
}

const AFTER_HELP: &str = "\
Without a subcommand one virtual machine is started: from --image or --config, from another host (--receive), from a \
checkpoint (--restore), or, with \
nothing but --api-sock, when it has been configured over that socket.

Exit status: the guest's own (0: orderly end, 99: fault, 101: panic, 102: crash), 1 if the VM could not be started, 2 for \
mistakes in flags or configuration, 137 if it was killed over its control socket.

Examples:
  vmm --image vmlinuz --initrd initrd.img --memory 256M --cmdline console=ttyS0 --disk path=disk.img --serial stdio
  vmm --image nmodule --memory 32M --net tap=tap0 --api-sock vm.sock
  vmm --config vm.json --api-sock vm.sock
  vmm --restore saved --net id=net0,tap=tap0 --api-sock vm.sock
  vmm ctl --sock vm.sock info
  vmm ctl --sock vm.sock migrate --to 10.77.0.2:7000
  vmm keys new keys; vmm keys host keys node1 10.77.0.1

See docs/vmm.md.";

#[derive(Debug, Subcommand)]
enum Command {
    Ctl(Box<ctl::Ctl>),
    #[command(subcommand)]
    Keys(keys::Keys),
    Ticket(keys::TicketOrder),
    Release(release::ReleaseOrder),
    Arbiter(arbiter::ArbiterOrder),
    /// Print completions for a shell.
    Completions {
        /// Which one.
        shell: Shell,
    },
    /// Print the OpenAPI document of the control interface.
    Openapi,
}

impl Command {
    fn run(self) -> ExitCode {
        let text = match self {
            Command::Ctl(ctl) => return ExitCode::from(ctl::run(&ctl)),
            Command::Completions { shell } => {
                let mut text = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "vmm", &mut text);
                text
            }
            Command::Openapi => api::openapi::text().into_bytes(),
            Command::Keys(order) => match keys::run(&order) {
                Ok(text) => text.into_bytes(),
                Err(e) => return failed("keys", &e),
            },
            Command::Ticket(order) => match keys::ticket(&order) {
                Ok(text) => text.into_bytes(),
                Err(e) => return failed("ticket", &e),
            },
            Command::Arbiter(order) => match arbiter::run(&order) {
                Ok(never) => match never {},
                Err(e) => return failed("arbiter", &e.to_string()),
            },
            Command::Release(order) => match release::run(&order) {
                Ok(text) => text.into_bytes(),
                Err(e) => return failed("release", &e),
            },
        };
        match std::io::stdout().write_all(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(e) => {
                say(format_args!("vmm: standard output: {e}"));
                ExitCode::from(STATUS_FAILED)
            }
        }
    }
}

/// Says it to who looks at standard error. That may be a file on a full disk: the exit status must be right all the same.
fn say(text: std::fmt::Arguments) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn failed(command: &str, why: &str) -> ExitCode {
    say(format_args!("vmm {command}: {why}"));
    ExitCode::from(STATUS_FAILED)
}

/// Says what is wrong with the command line, or what was asked for instead (`--help`); with the way to what is an order to a running VM.
fn wrong_usage(error: &clap::Error) -> ! {
    let _ = error.print();
    if let (ErrorKind::InvalidSubcommand, Some(ContextValue::String(name))) =
        (error.kind(), error.get(ContextKind::InvalidSubcommand))
        && Cli::command().find_subcommand("ctl").is_some_and(|ctl| ctl.find_subcommand(name).is_some())
    {
        say(format_args!("\nTo tell a running VM: vmm ctl {name}"));
    }
    std::process::exit(error.exit_code())
}

fn main() -> ExitCode {
    stats::process_starts();
    // SAFETY: before there are other threads; the option and value are valid.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, MALLOC_ARENAS) };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn,virtio_queue=off")).init();
    let Cli { args, sandbox, faults, command } = Cli::try_parse().unwrap_or_else(|e| wrong_usage(&e));
    if let Some(command) = command {
        return command.run();
    }
    let api_sock = args.api_sock.clone();
    let result = args.order().and_then(|order| {
        faults::set_up(&faults)?;
        sandbox::set_up(sandbox)?;
        let socket = api_sock.as_deref().map(|path| SocketFile::bind("api-sock", path)).transpose()?;
        if let Some(path) = &api_sock {
            // The place of what belongs to this VM: checkpoints beside it need no flag.
            sandbox::files::allow_beside(path, sandbox::files::Use::Change);
        }
        run(order, socket)
    });
    match result {
        Ok(status) => ExitCode::from(status),
        Err(e) => {
            for line in e.to_string().lines() {
                say(format_args!("vmm: {line}"));
            }
            ExitCode::from(if matches!(e, vmm::Error::Config(_)) { STATUS_USAGE } else { STATUS_FAILED })
        }
    }
}

fn run(order: Order, socket: Option<SocketFile>) -> vmm::Result<u8> {
    let stats = Arc::new(Stats::default());
    let control = Control::new(stats.clone());
    let engine = Engine::new();
    control.set_porting(engine.clone());
    match order {
        Order::Boot(config) => control.start(config)?,
        Order::Restore(request) => control.start_restored(&request)?,
        Order::Receive(config) => {
            engine.receive(&control, config, OwnerId::random()?)?;
            sandbox::confine(Kind::Control)?;
        }
        Order::Spawn(request) => control.spawn_only(&request)?,
        Order::Configure => control.await_configuration(),
    }
    let (end, name) = serve(&control, socket)?;
    if end == End::Killed {
        drop(name);
        // Nothing is waited for: not the guest, not the devices, not the threads.
        // SAFETY: ends the process; no memory is involved.
        unsafe { libc::_exit(end.status()) };
    }
    if let Some(vm) = control.vm() {
        vm.stop();
        port::end::release(&vm);
    }
    port::parting::finish();
    match &end {
        End::TripleFault | End::Crash(_) => say(format_args!("vmm: {end}")),
        end => log::info!("the VM has ended: {end:?}"),
    }
    Ok(end.status() as u8)
}

/// Serves the control interface until the process is to end.
fn serve(control: &Arc<Control>, socket: Option<SocketFile>) -> vmm::Result<(End, Option<SocketName>)> {
    let failed = |source| vmm::Error::Host { what: "control interface".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let mut ended = control.ended();
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let stopping = control.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stopping.finish(End::Stopped);
        });
        let started = control.clone();
        tokio::spawn(async move {
            // A VM that runs and is not on its way: what brought it there is over.
            while started.need_idle_vm().is_err() {
                tokio::time::sleep(SETTLED).await;
            }
            tokio::time::sleep(SETTLED).await;
            vmm::residence::give_start_code_back();
        });
        if let Some((listener, name)) = socket.map(SocketFile::split) {
            let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
            let mut stop = control.ended();
            // Answers under way are finished, so that who asked for a shutdown is answered.
            let server = axum::serve(listener, api::router(control.clone())).with_graceful_shutdown(async move {
                let _ = stop.wait_for(Option::is_some).await;
            });
            let serving = tokio::spawn(async move { server.await });
            let end = ended.wait_for(Option::is_some).await.ok().and_then(|e| e.clone());
            let _ = tokio::time::timeout(LAST_ANSWERS, serving).await;
            return Ok((end.unwrap_or(End::Stopped), Some(name)));
        }
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|e| e.clone());
        Ok((end.unwrap_or(End::Stopped), None))
    })
}

/// How long a VM runs before what started it is given back.
const SETTLED: std::time::Duration = std::time::Duration::from_secs(1);
/// How long answers under way may take when the process ends.
const LAST_ANSWERS: std::time::Duration = std::time::Duration::from_millis(200);
