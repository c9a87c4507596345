//! `GET /v1/events`: notices as server-sent events.
//!
//! Always true: a stream holds no notices of its own, only a number; there are at most [`STREAMS_MAX`] at a time; a stream ends
//! with the process.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::problem::Problem;
use super::{Answer, Shared, report};
use crate::control::Control;
use crate::notice::{self, Entry, Notice};

/// Most streams at a time.
pub const STREAMS_MAX: usize = 16;
/// How often a stream with nothing to say shows that it is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

static STREAMS: AtomicUsize = AtomicUsize::new(0);

/// A place among the streams.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        let more = |n| (n < STREAMS_MAX).then_some(n + 1);
        STREAMS.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        STREAMS.fetch_sub(1, Ordering::AcqRel);
    }
}

fn event(entry: &Entry) -> Event {
    let mut data = serde_json::to_value(&entry.notice).unwrap_or_default();
    if let Value::Object(fields) = &mut data {
        fields.insert("time_ms".into(), json!(entry.time_ms));
    }
    Event::default().id(entry.id.to_string()).event(entry.notice.name()).data(data.to_string())
}

/// What a new reader begins with: the state as it is.
fn greeting(control: &Control, id: u64) -> Event {
    let state = report::state(control).name().to_owned();
    let data = json!({ "state": state });
    let name = Notice::State { state, reason: None }.name();
    Event::default().id(id.to_string()).event(name).data(data.to_string())
}

pub(super) async fn stream(State(control): Shared, headers: HeaderMap) -> Answer<Response> {
    let Some(place) = Place::take() else {
        let detail = format!("{STREAMS_MAX} streams are open already; close one");
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail));
    };
    let since = headers.get("last-event-id").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let changed = notice::watch();
    let last = notice::last();
    let at = since.map_or(last, |s| s.min(last));
    let first = since.is_none().then(|| greeting(&control, at));
    let reader = Reader { at, first, changed, ended: control.ended(), _place: place, control };
    let stream = futures_util::stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok::<_, Infallible>(event), reader))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

struct Reader {
    at: u64,
    first: Option<Event>,
    changed: tokio::sync::watch::Receiver<u64>,
    ended: tokio::sync::watch::Receiver<Option<crate::vcpu::End>>,
    _place: Place,
    control: Arc<Control>,
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            self.changed.borrow_and_update();
            if let Some(entry) = notice::after(self.at) {
                self.at = entry.id;
                return Some(event(&entry));
            }
            if self.control.is_over() {
                return None;
            }
            tokio::select! {
                changed = self.changed.changed() => changed.ok()?,
                ended = self.ended.changed() => ended.ok()?,
            }
        }
    }
}
