//! virtio-net.
/// A network device.
pub struct NetDevice {}
