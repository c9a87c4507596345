//! KVM virtual machine monitor for storage guests.
