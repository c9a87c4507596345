//! How porting connections are protected.

use std::fmt;
use std::path::{Path, PathBuf};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{field, pairs};
use crate::error::FieldError;

/// What stands for [`TlsConfig::Off`].
const OFF: &str = "off";

/// How porting connections are protected: by TLS 1.3 with certificates on both sides, or, when somebody says so, not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsConfig {
    /// Not at all: for a network that nobody else can reach.
    Off,
    /// By TLS with these.
    Files(TlsFiles),
}

/// Files in PEM, as `vmm keys` makes them. They are read when this is set, not later.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate of this host, and what leads from it to the authority.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Certificates of the authorities whose hosts are trusted.
    pub ca: PathBuf,
    /// Public key (Ed25519) of who issues tickets. With it a port needs a ticket, on both sides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<PathBuf>,
}

impl TlsConfig {
    /// Reads `off` or `cert=FILE,key=FILE,ca=FILE[,issuer=FILE]`.
    pub fn from_flag(s: &str) -> Result<TlsConfig, FieldError> {
        if s == OFF {
            return Ok(TlsConfig::Off);
        }
        let mut files = TlsFiles::default();
        for pair in pairs(s) {
            let (key, value) = pair?;
            let path: PathBuf = field(key, value)?;
            match key {
                "cert" => files.cert = path,
                "key" => files.key = path,
                "ca" => files.ca = path,
                "issuer" => files.issuer = Some(path),
                _ => return Err(FieldError::new(key, "unknown; known are cert, key, ca, issuer; or off alone")),
            }
        }
        let missing = files.named().find(|(_, path)| path.as_os_str().is_empty()).map(|(name, _)| name);
        match missing {
            Some(name) => Err(FieldError::new(name, "is missing")),
            None => Ok(TlsConfig::Files(files)),
        }
    }

    /// What is wrong with it, as far as can be said without reading files.
    pub fn mistakes(&self, path: &str) -> Vec<FieldError> {
        let TlsConfig::Files(files) = self else { return Vec::new() };
        let mistake = |(name, file): (&str, &Path)| {
            let message = match std::fs::metadata(file) {
                _ if file.as_os_str().is_empty() => "is missing".into(),
                Err(e) => format!("{}: {e}", file.display()),
                Ok(m) if !m.is_file() => format!("{}: not a file", file.display()),
                Ok(_) => return None,
            };
            Some(FieldError::new(format!("{path}.{name}"), message))
        };
        files.named().filter_map(mistake).collect()
    }
}

impl TlsFiles {
    /// All files, by field.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        [("cert", Some(&self.cert)), ("key", Some(&self.key)), ("ca", Some(&self.ca)), ("issuer", self.issuer.as_ref())]
            .into_iter()
            .filter_map(|(name, path)| Some((name, path?.as_path())))
    }
}

impl Serialize for TlsConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TlsConfig::Off => serializer.serialize_str(OFF),
            TlsConfig::Files(files) => files.serialize(serializer),
        }
    }
}

/// By hand, so that a mistake within the object is named by its field, which an untagged enum does not do.
impl<'de> Deserialize<'de> for TlsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TlsConfig, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = TlsConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"off\" or an object with cert, key and ca")
            }

            fn visit_str<E: serde::de::Error>(self, s: &str) -> Result<TlsConfig, E> {
                if s == OFF { Ok(TlsConfig::Off) } else { Err(E::invalid_value(serde::de::Unexpected::Str(s), &self)) }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TlsConfig, A::Error> {
                TlsFiles::deserialize(MapAccessDeserializer::new(map)).map(TlsConfig::Files)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl JsonSchema for TlsConfig {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "TlsConfig".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let files = generator.subschema_for::<TlsFiles>();
        json_schema!({
            "description": "How porting connections are protected: TLS 1.3 with certificates on both sides, or not at all.",
            "oneOf": [files, { "type": "string", "const": OFF }],
        })
    }
}
