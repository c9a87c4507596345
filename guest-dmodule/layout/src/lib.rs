//! Write-anywhere file system, without I/O.
