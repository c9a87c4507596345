//! The system calls each kind of thread may make.
//!
//! What is not here was not needed by any feature under test; the tests of the whole program run with the sandbox on.

/// Memory, time, locks, reading and writing what is open: what every thread does.
pub const ALL: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    // A signal that ends the process may be any thread's, and the terminal is put right then.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Beside [`ALL`], those that serve devices: streams of vsock, which are accepted, and connected to a path (a path cannot
/// be made or opened); a thread that watches a back end that came back, confined like the one that starts it.
pub const DEVICES: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_fcntl,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
];

/// Beside [`DEVICES`], what the control interface, porting and checkpoints do. There is no way to execute a program, to look into
/// another process, to mount, or to load anything into the kernel.
pub const CONTROL: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_bind,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_chdir,
    libc::SYS_clone,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getuid,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioctl,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_lstat,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setscheduler,
    libc::SYS_seccomp,
    libc::SYS_sendfile,
    libc::SYS_set_tid_address,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_sync_file_range,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_userfaultfd,
];

/// `ioctl`s of the threads that face the guest, by the whole request number.
pub const DEVICE_IOCTLS: &[u64] = &[
    0x0000_1277, // BLKDISCARD
    0x0000_127d, // BLKSECDISCARD
    0x0000_127f, // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0x0000_5401, // TCGETS
    0x0000_5402, // TCSETS
    0x0000_5403, // TCSETSW
    0x0000_5404, // TCSETSF
    0x0000_5421, // FIONBIO
    0x0000_541b, // FIONREAD
    0x0000_8913, // SIOCGIFFLAGS
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d1, // TUNSETTXFILTER
    0x8004_54d2, // TUNGETIFF
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54d9, // TUNSETQUEUE
    0x4004_54e2, // TUNSETCARRIER
];

/// The type (second byte) of KVM's and vhost's `ioctl`s.
pub const KVM_IOCTL: u64 = 0xae00;
/// vhost's.
pub const VHOST_IOCTL: u64 = 0xaf00;
/// Where the type stands.
pub const IOCTL_TYPE: u64 = 0xff00;
