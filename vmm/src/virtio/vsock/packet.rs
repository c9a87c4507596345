//! The header of every vsock packet (virtio 1.2, section 5.10.6), little-endian.

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;
/// Most bytes behind a header.
pub const PAYLOAD_MAX: usize = 64 << 10;

/// What a packet wants.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a SHUTDOWN.
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// From bytes; any bytes are a header.
    pub fn parse(bytes: &[u8; HEADER]) -> Header {
        let mut rest = bytes.as_slice();
        let mut take = |n: usize| {
            let (field, more) = rest.split_at(n);
            rest = more;
            field.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Header {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// To bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let bytes: [u8; HEADER] = std::array::from_fn(|i| i as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.src_port, header.dst_port, header.len), (0x1312_1110, 0x1716_1514, 0x1b1a_1918));
        assert_eq!((header.kind, header.op, header.fwd_cnt), (0x1d1c, 0x1f1e, 0x2b2a_2928));
        assert_eq!(header.encode(), bytes);
    }
}
