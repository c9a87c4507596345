//! Checkpoint format and the porting protocol as a state machine without I/O.
