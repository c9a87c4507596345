use super::*;

#[test]
fn the_document_is_the_one_in_docs() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(kept == openapi::text(), "docs/openapi.json is old; write it anew: vmm openapi > docs/openapi.json");
}

#[test]
fn operations_are_told_apart_and_references_lead_somewhere() {
    let mut ids: Vec<&str> = routes::all().iter().map(|r| r.id).collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count);
    let document = openapi::document();
    let text = document.to_string();
    for part in text.split("\"$ref\":\"#").skip(1) {
        let pointer = part.split('"').next().unwrap();
        assert!(document.pointer(pointer).is_some(), "{pointer}");
    }
    assert!(text.contains("\"$ref\""));
}
