//! The OpenAPI 3.1 document, made of the table of routes and the types of the code.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use super::problem::{self, Problem};
use super::routes::{self, Content, Route};

/// The document. docs/openapi.json holds its text; a test compares.
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|s| {
        s.definitions_path = "/components/schemas".into();
        s.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for route in routes::all() {
        let path = paths.entry(route.path).or_insert_with(|| parameters(route.path));
        path[route.method.key()] = operation(&route, &mut generator);
    }
    // The reference is in every operation; the definition comes with it.
    let _ = generator.subschema_for::<Problem>();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "vmm",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Controls one virtual machine over the unix socket given with --api-sock. \
                Errors are problem documents (RFC 9457).",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": { "schemas": generator.take_definitions(true) },
    })
}

/// The document as text, as it is kept in docs/.
pub fn text() -> String {
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
}

/// What varies in a path: `{id}` of a migration is a number, of a device its name.
fn parameters(path: &str) -> Value {
    let all: Vec<Value> = path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            let schema = match path.starts_with("/v1/migrations") {
                true => json!({ "type": "integer", "format": "uint64", "minimum": 0 }),
                false => json!({ "type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$" }),
            };
            json!({ "name": name, "in": "path", "required": true, "schema": schema })
        })
        .collect();
    if all.is_empty() { json!({}) } else { json!({ "parameters": all }) }
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let content = match &route.content {
        Content::Json(schema) => json!({ "application/json": { "schema": schema(generator) } }),
        Content::Text(media_type) => json!({ *media_type: { "schema": { "type": "string" } } }),
    };
    let mut responses = Map::new();
    responses.insert(route.status.to_string(), json!({ "description": title(route.status), "content": content }));
    for status in
        std::iter::once(&400).filter(|_| route.path.contains('{') || route.request.is_some()).chain(route.problems)
    {
        let description = title(*status);
        responses.insert(status.to_string(), json!({ "description": description, "content": problem(generator) }));
    }
    let mut operation = json!({
        "operationId": route.id,
        "tags": [route.tag],
        "summary": route.summary,
        "responses": responses,
    });
    if let Some(schema) = route.request {
        let content = json!({ "application/json": { "schema": schema(generator) } });
        operation["requestBody"] = json!({ "required": true, "content": content });
    }
    operation
}

fn problem(generator: &mut SchemaGenerator) -> Value {
    json!({ problem::MEDIA_TYPE: { "schema": reference::<Problem>(generator) } })
}

fn reference<T: JsonSchema>(generator: &mut SchemaGenerator) -> Value {
    generator.subschema_for::<T>().to_value()
}

fn title(status: u16) -> &'static str {
    axum::http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or("Error")
}
