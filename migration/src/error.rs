/// What is wrong with bytes from the peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The stream does not begin a frame where one is due.
    #[error("not a porting stream: frame magic {0:#010x}")]
    Magic(u32),
    /// The stream begins as TLS does.
    #[error("the other side speaks TLS, and it is off here: give this vmm keys too (--tls), or switch it off there")]
    Tls,
    /// The frame layout is one this build does not know.
    #[error("frame layout {0} is not known here")]
    Layout(u16),
    /// Unknown frame type.
    #[error("frame type {0} is not known here")]
    Type(u16),
    /// Reserved bits are set.
    #[error("reserved bits of {0} are set")]
    Reserved(&'static str),
    /// A length or count exceeds its bound.
    #[error("{what} is {value}, the bound is {bound}")]
    Bound {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The most it may be.
        bound: u64,
    },
    /// A frame is missing, repeated or out of order.
    #[error("frame {got} arrived where {expected} was due")]
    Sequence {
        /// Sequence number that was due.
        expected: u64,
        /// Sequence number that came.
        got: u64,
    },
    /// Damaged on the way.
    #[error("checksum of a {0} frame does not match")]
    Checksum(&'static str),
    /// The payload ends too early.
    #[error("{0} ends too early")]
    Short(&'static str),
    /// The payload goes on behind its end.
    #[error("{0} has {1} bytes too many")]
    Trailing(&'static str, usize),
    /// A field has a value that is not allowed.
    #[error("{what} has the value {value}, which is not allowed")]
    Value {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A page run lies outside of guest memory.
    #[error("page run of {pages} pages at {address:#x} is outside of guest memory")]
    OutsideMemory {
        /// Guest-physical address.
        address: u64,
        /// Length.
        pages: u64,
    },
    /// Not a state file of a checkpoint.
    #[error("not a checkpoint of a VM")]
    Foreign,
    /// The file's format is another.
    #[error("checkpoint format {got}, this build knows {known}")]
    Format {
        /// Format found.
        got: u32,
        /// Format known.
        known: u32,
    },
    /// The file was written by a build that can do more.
    #[error("the checkpoint needs features this build does not know: {0:#x}")]
    Features(u32),
    /// A checksum in a file does not match.
    #[error("the {0} is damaged: its checksum does not match")]
    Damaged(&'static str),
    /// Not a ticket.
    #[error("not a ticket for a port")]
    NoTicket,
    /// A ticket of another format.
    #[error("ticket of version {got}, this build knows {known}")]
    TicketVersion {
        /// Version found.
        got: u16,
        /// Version known.
        known: u16,
    },
    /// Text is not UTF-8.
    #[error("{0} is not UTF-8")]
    Text(&'static str),
    /// A section that must be there is not, or is there twice.
    #[error("state section {0:?} is missing")]
    MissingSection(String),
    /// A section twice.
    #[error("state section {0:?} is there twice")]
    DuplicateSection(String),
    /// A section is newer than this build.
    #[error("state section {name:?} has version {got}, this build knows up to {known}")]
    SectionVersion {
        /// Section.
        name: String,
        /// Version found.
        got: u32,
        /// Newest version known.
        known: u32,
    },
}
