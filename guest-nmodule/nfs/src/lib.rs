//! NFSv3 (RFC 1813), MOUNTv3 and portmap (RFC 1833) engines over ONC RPC (RFC 5531), without I/O.
//!
//! A [`record::RecordReader`] makes records of a connection's bytes; [`engine::Engine::handle`] answers each with at
//! most one [`record::Reply`], asking a [`service::FileService`] for file-system primitives. Connections, memory
//! budgets and time are the caller's.
//!
//! Always true: whatever comes from the network is hostile. It is never a reason to panic, and memory taken for it is
//! bounded before it is taken: [`record::RECORD_MAX`] a record, [`nfs3::TRANSFER_MAX`] or [`nfs3::DIRECTORY_MAX`] a reply.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod duplicate;
pub mod engine;
pub mod export;
pub mod handle;
pub mod mount;
pub mod nfs3;
pub mod portmap;
pub mod record;
pub mod rpc;
pub mod service;
pub mod xdr;
