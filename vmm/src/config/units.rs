//! Values with a notation of their own: memory sizes and MAC addresses.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A size in bytes, written as a number or as text with K, M or G (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct MemorySize(u64);

impl MemorySize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// From bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        MemorySize(bytes)
    }
}

impl Default for MemorySize {
    /// 64 MiB.
    fn default() -> Self {
        MemorySize(64 << 20)
    }
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let digits = s.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &s[digits.len()..] {
            "" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            unit => return Err(format!("{unit:?} is not a unit; use K, M or G")),
        };
        let n: u64 = digits.parse().map_err(|_| format!("{s:?} is not a size like 32M"))?;
        n.checked_mul(1 << shift).map(MemorySize).ok_or_else(|| format!("{s} is too large"))
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = MemorySize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes or text like \"32M\"")
            }
            fn visit_u64<E>(self, v: u64) -> Result<MemorySize, E> {
                Ok(MemorySize(v))
            }
            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<MemorySize, E> {
                v.parse().map_err(E::custom)
            }
        }
        if d.is_human_readable() { d.deserialize_any(Visitor) } else { u64::deserialize(d).map(MemorySize) }
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A group address.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// A locally administered unicast address made of random bytes.
    pub const fn local(mut random: [u8; 6]) -> Self {
        random[0] = random[0] & !1 | 2;
        MacAddress(random)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("{s:?} is not a MAC address like 02:00:00:00:00:01");
        let mut mac = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(MacAddress(mac))
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for MemorySize {
    fn schema_name() -> Cow<'static, str> {
        "MemorySize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A size in bytes, as a number or as text with K, M or G (powers of 1024).",
            "anyOf": [
                { "type": "integer", "minimum": 0, "maximum": u64::MAX },
                { "type": "string", "pattern": "^[0-9]{1,10}(K|M|G|KiB|MiB|GiB)?$", "examples": ["64M"] },
            ],
        })
    }
}

impl JsonSchema for MacAddress {
    fn schema_name() -> Cow<'static, str> {
        "MacAddress".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "An Ethernet address.",
            "type": "string",
            "pattern": "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$",
            "examples": ["02:00:00:00:00:01"],
        })
    }
}

/// Schema of a `SocketAddr`.
pub fn socket_address_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "IP:PORT, an IPv6 address in brackets.",
        "type": "string",
        "pattern": SOCKET_ADDRESS,
        "examples": ["10.77.0.2:7000"],
    })
}

/// Schema of an `Option<SocketAddr>`.
pub fn optional_socket_address_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "description": "IP:PORT, an IPv6 address in brackets.",
        "type": ["string", "null"],
        "pattern": SOCKET_ADDRESS,
        "examples": ["10.77.0.2:7000"],
    })
}

/// IPv4 in full, IPv6 as to its letters; ports below 60000.
const SOCKET_ADDRESS: &str = r"^(((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])|\[::1?\]):[1-5]?[0-9]{1,4}$";
