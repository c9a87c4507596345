//! NFSv3, MOUNTv3 and portmap engines, without I/O.
