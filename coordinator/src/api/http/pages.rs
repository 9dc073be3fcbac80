//! Routes of the dashboard.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ganglion_proto::MESSAGE_LIMIT;
use ganglion_proto::job::{Family, ModelKind};
use ganglion_proto::names::named;
use ganglion_proto::record::EventKind;
use ganglion_proto::record::found::Found;
use serde_json::{Map, Value, json};
use tokio::io::AsyncReadExt;
use tokio::time::{Instant, timeout};

use super::guard::{Admission, TOKEN_FILE};
use super::{Site, assets, prometheus};
use crate::records::chronicle::REAL_PICTURE;
use crate::records::curve::{Bucket, Summary};
use crate::records::scalars::Shown;
use crate::records::status;
use crate::system::clock::now;

/// Time limit to produce an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Maximum age of the shell's view while its loop counts as running; it publishes one a second.
// Five views missed: a loop that is merely busy for a moment stays ready.
const READY_LIMIT: Duration = Duration::from_secs(5);
/// Number of points in a curve: the default, and the maximum.
// Bounds an answer: each series has three numbers for each point.
const POINTS: (u64, u64) = (600, 2000);
/// Maximum number of events in a page, and of their bytes.
const EVENT_PAGE: (usize, usize) = (500, 256 << 10);
/// Maximum number of classes that the status names.
const CLASSES: usize = 20;
/// Maximum number of evaluations in a list.
const EVALUATIONS: usize = 500;
/// Maximum number of pictures in a list.
const PICTURES: usize = 500;

/// Security headers of every answer: nothing from elsewhere is loaded, no content type is guessed,
/// no other page may frame this one.
const HARDENING: [(HeaderName, HeaderValue); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
];

/// Builds the router of all pages.
pub(super) fn router(site: Arc<Site>) -> Router {
    let mut router = Router::new()
        .route("/api/status", get(tell_status))
        .route("/api/metrics", get(tell_metrics))
        .route("/api/events", get(tell_events))
        .route("/api/samples", get(tell_samples))
        .route("/api/evaluations", get(tell_evaluations))
        .route("/samples/{name}", get(show_samples))
        .route("/metrics", get(tell_prometheus))
        .route("/healthz", get(tell_health))
        .route("/readyz", get(tell_ready));
    for asset in assets::all() {
        router = router.route(asset.path, get(async || asset.answer()));
    }
    let nothing = async || refusal(StatusCode::NOT_FOUND, "there is nothing here");
    router.fallback(nothing).layer(from_fn_with_state(site.clone(), check)).with_state(site)
}

/// Value of a query parameter, without decoding.
pub(super) fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let mut pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Checks the access of a request, and adds the security headers to its answer.
async fn check(State(site): State<Arc<Site>>, request: Request, next: Next) -> Response {
    // A middleware around all routes: one that is added later is guarded too.
    let mut response = match admit(&site, &request) {
        Ok(cookie) => {
            // Bounds all handlers, their reads of files included.
            let answer = timeout(ANSWER_LIMIT, next.run(request)).await;
            let late = |_| refusal(StatusCode::SERVICE_UNAVAILABLE, "the answer took too long");
            let mut response = answer.unwrap_or_else(late);
            if let Some(cookie) = cookie {
                response.headers_mut().insert(header::SET_COOKIE, cookie);
            }
            response
        }
        Err(refusal) => *refusal,
    };
    for (name, value) in HARDENING {
        response.headers_mut().insert(name, value);
    }
    response.headers_mut().entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn admit(site: &Site, request: &Request) -> Result<Option<HeaderValue>, Box<Response>> {
    let refuse = |status, reason: &str| Err(Box::new(refusal(status, reason)));
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response =
            refusal(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: nothing can be changed here");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Err(Box::new(response));
    }
    // Nothing here takes one, and an unread body would hold the connection.
    if has_body(request.headers()) {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "no body is read here");
    }
    let is_probe = ["/healthz", "/readyz"].contains(&request.uri().path());
    match site.guard.authorise(request.uri(), request.headers(), is_probe) {
        Admission::Granted => Ok(None),
        Admission::GrantedWith(cookie) => Ok(Some(cookie)),
        Admission::WrongHost => refuse(
            StatusCode::MISDIRECTED_REQUEST,
            "this site is for its own machine, by the name localhost or 127.0.0.1",
        ),
        Admission::NoToken => {
            let reason = format!(
                "the token in the run directory's {TOKEN_FILE} is needed: add ?token=... to the address"
            );
            let mut response = refusal(StatusCode::UNAUTHORIZED, &reason);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            Err(Box::new(response))
        }
    }
}

fn has_body(headers: &HeaderMap) -> bool {
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

fn refusal(status: StatusCode, reason: &str) -> Response {
    (status, as_json(&json!({ "error": reason }))).into_response()
}

fn as_json(value: &Value) -> Response {
    json_text(value.to_string())
}

fn json_text(text: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
}

/// A number in the query, or its default where it is absent; `None` for text that is not a number.
fn number(uri: &Uri, name: &str, default: u64) -> Option<u64> {
    parameter(uri, name).map_or(Some(default), |given| given.parse().ok())
}

fn no_number() -> Response {
    refusal(StatusCode::BAD_REQUEST, "from, points and after are numbers, such as ?from=100&points=500")
}

async fn tell_status(State(site): State<Arc<Site>>) -> Response {
    let Some(view) = site.view.borrow().clone() else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "the coordinator is starting");
    };
    let mut told = status::json(&view.status);
    {
        let known = site.chronicle.look();
        told["now"] = now().into();
        told["age"] = view.at.elapsed().as_secs_f64().into();
        told["begun"] = known.begun.into();
        told["rows"] = known.rows.into();
        told["events"] = known.event_count.into();
        told["pictures"] = (known.count(EventKind::Samples) + known.count(EventKind::RealSamples)).into();
        told["data"] = known.data.as_ref().map_or(Value::Null, data);
        told["checkpoints"] = json!(known.checkpoints);
        told["evaluations"] = known.evaluations.len().into();
        told["best"] = json!(known.best);
        told["alarms"] = json!(known.alarms);
    }
    told["job"] = site.job.clone();
    // `farewell` waits for this: the client has seen how the run ended.
    site.asked.send_replace(Some((Instant::now(), !view.status.outcome.is_empty())));
    as_json(&told)
}

/// The data set as a worker found it, with its first classes, and what is most likely not meant.
fn data(found: &Found) -> Value {
    let mut told = json!(found);
    // Each page asks for this each second or so; all that are known are in the event.
    told["classes"] = json!(found.classes.iter().take(CLASSES).collect::<Vec<_>>());
    told["summary"] = found.to_string().into();
    told["warnings"] = json!(found.warnings());
    told
}

async fn tell_metrics(State(site): State<Arc<Site>>, uri: Uri) -> Response {
    let (Some(from), Some(points)) = (number(&uri, "from", 0), number(&uri, "points", POINTS.0)) else {
        return no_number();
    };
    let points = usize::try_from(points.clamp(1, POINTS.1)).unwrap_or(1);
    // Copied under the lock and written without it: the shell's loop waits for this lock.
    let (buckets, rows, names, newest) = {
        let known = site.chronicle.look();
        (known.curve(from, points), known.rows, known.series().to_vec(), known.newest.clone())
    };
    let mut told = Map::new();
    told.insert("rows".to_string(), rows.into());
    told.insert("step".to_string(), buckets.iter().map(|bucket| bucket.step).collect());
    told.insert("time".to_string(), buckets.iter().map(|bucket| bucket.time).collect());
    let scalars = newest.iter().flat_map(|row| row.scalars.iter()).map(|(name, _)| name);
    let scalars = scalars.filter(|name| names.iter().any(|known| known == name)).map(|name| {
        let shown = Shown::new(name);
        json!({ "name": name, "group": shown.group.name, "of": shown.of, "label": shown.short() })
    });
    told.insert("scalars".to_string(), scalars.collect());
    for (at, name) in names.into_iter().enumerate() {
        told.insert(name, series(&buckets, at));
    }
    as_json(&Value::Object(told))
}

fn series(buckets: &[Bucket], at: usize) -> Value {
    let column = |of: fn(&Summary) -> Option<f64>| -> Value {
        buckets.iter().map(|bucket| bucket.series.get(at).and_then(of).and_then(short)).collect()
    };
    json!({
        "mean": column(Summary::mean),
        "low": column(|summary| summary.mean().map(|_| summary.low)),
        "high": column(|summary| summary.mean().map(|_| summary.high)),
    })
}

/// Rounds to five digits, which are enough for a curve.
fn short(value: f64) -> Option<f64> {
    format!("{value:.4e}").parse().ok().filter(|value: &f64| value.is_finite())
}

async fn tell_events(State(site): State<Arc<Site>>, uri: Uri) -> Response {
    let Some(after) = number(&uri, "after", 0) else { return no_number() };
    let (events, first, count) = {
        let known = site.chronicle.look();
        (known.events(after, EVENT_PAGE.0, EVENT_PAGE.1), known.first_event(), known.event_count)
    };
    // Where nothing fits, the client still moves on to what is kept, and never behind the newest.
    let next = events.last().map_or(after.max(first).min(count), |(number, _)| number + 1);
    let events: Vec<String> =
        events.into_iter().map(|(number, line)| format!(r#"{{"number":{number},"event":{line}}}"#)).collect();
    json_text(format!(r#"{{"first":{first},"next":{next},"count":{count},"events":[{}]}}"#, events.join(",")))
}

async fn tell_samples(State(site): State<Arc<Site>>) -> Response {
    let (steps, has_real, ending) = {
        let known = site.chronicle.look();
        (known.pictures(PICTURES), known.has_real, if known.writes_text { TEXT } else { PICTURE })
    };
    let name = |step: u64| json!({ "step": step, "url": format!("/samples/{}", file_name(step, ending)) });
    let real = has_real.then(|| format!("/samples/{REAL_PICTURE}"));
    as_json(&json!({ "samples": steps.into_iter().map(name).collect::<Vec<_>>(), "real": real }))
}

async fn tell_evaluations(State(site): State<Arc<Site>>) -> Response {
    let evaluations: Vec<_> =
        site.chronicle.look().evaluations.values().rev().take(EVALUATIONS).cloned().collect();
    as_json(&json!({ "evaluations": evaluations.into_iter().rev().collect::<Vec<_>>() }))
}

/// Endings of files of samples.
const PICTURE: &str = "png";
const TEXT: &str = "txt";

fn file_name(step: u64, ending: &str) -> String {
    format!("step-{step:08}.{ending}")
}

/// Name of a file of samples and its content type, if the coordinator gives such a name.
fn file_of_samples(name: &str) -> Option<(String, &'static str)> {
    if name == REAL_PICTURE {
        return Some((name.to_owned(), "image/png"));
    }
    let (stem, ending) = name.split_once('.')?;
    let content = match ending {
        PICTURE => "image/png",
        TEXT => "text/plain; charset=utf-8",
        _ => return None,
    };
    let known = file_name(stem.strip_prefix("step-")?.parse().ok()?, ending);
    (known == name).then_some((known, content))
}

async fn show_samples(State(site): State<Arc<Site>>, Path(name): Path<String>) -> Response {
    let missing = || refusal(StatusCode::NOT_FOUND, "there are no such samples");
    // Only names that the coordinator gives: no text of a request becomes a path.
    let Some((known, content)) = file_of_samples(&name) else { return missing() };
    let Ok(file) = tokio::fs::File::open(site.samples.join(known)).await else { return missing() };
    let mut png = Vec::new();
    // A picture came in one message, so it is no larger; a foreign file is cut.
    match file.take(MESSAGE_LIMIT as u64).read_to_end(&mut png).await {
        // A browser's request includes the run's name, and the picture of a step never changes.
        Ok(_) => {
            let headers = [
                (header::CONTENT_TYPE, HeaderValue::from_static(content)),
                (header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=86400")),
            ];
            (headers, Body::from(png)).into_response()
        }
        Err(_) => missing(),
    }
}

async fn tell_prometheus(State(site): State<Arc<Site>>, headers: HeaderMap) -> Response {
    let Some(view) = site.view.borrow().clone() else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "the coordinator is starting");
    };
    let accepted = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let form = prometheus::Form::accepted(accepted);
    let kind = site.job["model"]["kind"].as_str().and_then(named::<ModelKind>);
    let family = kind.map_or(Family::Gan, ModelKind::family);
    let Ok(text) = prometheus::render(&view, &site.chronicle, family, form) else {
        return refusal(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written");
    };
    ([(header::CONTENT_TYPE, HeaderValue::from_static(form.content_type()))], text).into_response()
}

/// Health of the process: it serves, and its loop makes progress. Before the first view it is starting.
async fn tell_health(State(site): State<Arc<Site>>) -> Response {
    match site.view.borrow().as_ref().and_then(|view| view.is_hung_for()) {
        None => "ok\n".into_response(),
        Some(age) => stuck(age),
    }
}

fn stuck(age: Duration) -> Response {
    let reason = format!("the coordinator's loop has not come round for {} s\n", age.as_secs());
    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn tell_ready(State(site): State<Arc<Site>>) -> Response {
    let age = site.view.borrow().as_ref().map(|view| view.at.elapsed());
    // Stricter than health: a probe that takes traffic away may do so early, one that kills may not.
    match age {
        Some(age) if age <= READY_LIMIT => "ready\n".into_response(),
        Some(age) => stuck(age),
        None => (StatusCode::SERVICE_UNAVAILABLE, "the coordinator is starting\n").into_response(),
    }
}
