//! A configuration from JSON, in one piece or in parts, with every mistake named.
//!
//! A parser stops at the first mistake. So when one is found, each field, and each element of a list, is parsed for itself: what
//! is reported is complete, though not what a mistake in one field would have hidden within the same element.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::Config;
use crate::error::{Error, FieldError, Result};

/// What a path is called that is not a field's.
const WHOLE: &str = "config";

/// Some fields of a configuration; null stands for a field's default.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ConfigPatch(pub Map<String, Value>);

impl JsonSchema for ConfigPatch {
    fn schema_name() -> Cow<'static, str> {
        "ConfigPatch".into()
    }

    /// As that of [`Config`], with nothing required.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = Config::json_schema(generator);
        let object = schema.ensure_object();
        object.remove("required");
        object
            .insert("description".into(), "Some fields of a configuration; null stands for a field's default.".into());
        if let Some(Value::Object(fields)) = object.get_mut("properties") {
            for field in fields.values_mut() {
                let of_field = field.take();
                *field = json!({ "anyOf": [of_field, { "type": "null" }] });
            }
        }
        schema
    }
}

impl Config {
    /// Parses JSON; the error names all fields that are wrong. Not yet checked: see [`Config::validate`].
    pub fn from_json(json: &[u8]) -> Result<Config> {
        let wrong = |e: serde_json::Error| Error::Config(vec![FieldError::new(WHOLE, e.to_string())]);
        if json.trim_ascii_start().first() != Some(&b'{') {
            return Err(Error::Config(vec![FieldError::new(WHOLE, "must be a JSON object")]));
        }
        let mut de = serde_json::Deserializer::from_slice(json);
        let config: Config = serde_path_to_error::deserialize(&mut de).map_err(|e| {
            let first = mistake(&e.path().to_string(), e.inner());
            let value: Value = match serde_json::from_slice(json) {
                Ok(value) => value,
                Err(e) => return wrong(e),
            };
            let all = mistakes(&value);
            Error::Config(if all.is_empty() { vec![first] } else { all })
        })?;
        de.end().map_err(wrong)?;
        let given: Value = serde_json::from_slice(json).map_err(wrong)?;
        match misplaced_list(&given, &config) {
            Some(e) => Err(Error::Config(vec![e])),
            None => Ok(config),
        }
    }

    /// This configuration with some of its fields set, null to their defaults. Only these are checked.
    pub fn with_parts(self, parts: Map<String, Value>) -> Result<Config> {
        let names: Vec<String> = parts.keys().cloned().collect();
        let mut whole = serde_json::to_value(&self).map_err(|e| Error::Config(vec![mistake(".", &e)]))?;
        if let Value::Object(fields) = &mut whole {
            for (name, value) in parts {
                match value {
                    Value::Null => fields.remove(&name),
                    value => fields.insert(name, value),
                };
            }
        }
        let mut config: Config = match serde_path_to_error::deserialize(&whole) {
            Ok(config) => config,
            Err(e) => {
                let all = mistakes(&whole);
                let first = || vec![mistake(&e.path().to_string(), e.inner())];
                return Err(Error::Config(if all.is_empty() { first() } else { all }));
            }
        };
        if let Some(e) = misplaced_list(&whole, &config) {
            return Err(Error::Config(vec![e]));
        }
        let of_parts = |field: &str| {
            let end = field.find(['[', '.']).unwrap_or(field.len());
            names.iter().any(|n| n == &field[..end])
        };
        if let Err(Error::Config(mut errors)) = config.validate() {
            errors.retain(|e| of_parts(&e.field));
            if !errors.is_empty() {
                return Err(Error::Config(errors));
            }
        }
        Ok(config)
    }
}

/// A mistake at `path`; where in the text it is, is said only if the path does not.
pub(crate) fn mistake(path: &str, e: &serde_json::Error) -> FieldError {
    let text = e.to_string();
    match path {
        "." => FieldError::new(WHOLE, text),
        // A field without a name has one in the answer all the same.
        "" => mistake("\"\"", e),
        path => FieldError::new(path, text.split(" at line ").next().unwrap_or_default()),
    }
}

/// A list that stands for an object: serde takes the fields of a struct in their order, too, which nobody means.
pub(crate) fn misplaced_list(given: &Value, understood: &impl serde::Serialize) -> Option<FieldError> {
    fn find(given: &Value, understood: Option<&Value>, path: &str) -> Option<String> {
        match (given, understood) {
            (Value::Array(a), Some(Value::Array(b))) => {
                a.iter().zip(b).enumerate().find_map(|(i, (a, b))| find(a, Some(b), &format!("{path}[{i}]")))
            }
            // A field that is not written when it is empty.
            (Value::Array(a), None) if a.is_empty() => None,
            (Value::Array(_), _) => Some(path.to_owned()),
            (Value::Object(a), Some(Value::Object(b))) => {
                let dot = if path.is_empty() { "" } else { "." };
                a.iter().find_map(|(name, a)| find(a, b.get(name), &format!("{path}{dot}{name}")))
            }
            _ => None,
        }
    }
    let understood = serde_json::to_value(understood).ok()?;
    find(given, Some(&understood), "").map(|path| FieldError::new(path, "must be an object, not a list"))
}

/// What is wrong with a JSON value that is to be a configuration: at most one mistake for each field and element.
fn mistakes(value: &Value) -> Vec<FieldError> {
    let mut out = Vec::new();
    let Value::Object(fields) = value else { return out };
    for (name, value) in fields {
        match value {
            Value::Array(elements) => {
                for (i, element) in elements.iter().enumerate() {
                    let first = format!("{name}[0]");
                    if let Some(mut e) = alone(name, json!([element])) {
                        if let Some(rest) = e.field.strip_prefix(&first) {
                            e.field = format!("{name}[{i}]{rest}");
                        }
                        out.push(e);
                    }
                }
                if elements.is_empty() {
                    out.extend(alone(name, json!([])));
                }
            }
            value => out.extend(alone(name, value.clone())),
        }
    }
    // A field that is not there is the same mistake for each element of its list.
    out.dedup();
    out
}

fn alone(name: &str, value: Value) -> Option<FieldError> {
    let whole = Value::Object(Map::from_iter([(name.to_owned(), value)]));
    let result: std::result::Result<Config, _> = serde_path_to_error::deserialize(&whole);
    result.err().map(|e| mistake(&e.path().to_string(), e.inner()))
}
