//! Files of the page, built in: it loads nothing from elsewhere.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// A file with its content type.
pub(super) struct Asset {
    /// Path at which it is served.
    pub path: &'static str,
    kind: &'static str,
    /// Content of the file.
    pub content: &'static str,
}

static ASSETS: [Asset; 8] = [
    Asset { path: "/", kind: "text/html; charset=utf-8", content: include_str!("assets/index.html") },
    Asset { path: "/style.css", kind: "text/css; charset=utf-8", content: include_str!("assets/style.css") },
    Asset { path: "/app.js", kind: "text/javascript; charset=utf-8", content: include_str!("assets/app.js") },
    Asset {
        path: "/chart.js",
        kind: "text/javascript; charset=utf-8",
        content: include_str!("assets/chart.js"),
    },
    Asset {
        path: "/format.js",
        kind: "text/javascript; charset=utf-8",
        content: include_str!("assets/format.js"),
    },
    Asset { path: "/job.js", kind: "text/javascript; charset=utf-8", content: include_str!("assets/job.js") },
    Asset {
        path: "/timeline.js",
        kind: "text/javascript; charset=utf-8",
        content: include_str!("assets/timeline.js"),
    },
    Asset { path: "/icon.svg", kind: "image/svg+xml", content: include_str!("assets/icon.svg") },
];

/// All built-in files.
pub(super) fn all() -> &'static [Asset] {
    &ASSETS
}

impl Asset {
    /// Answer with the file's content.
    pub(super) fn answer(&self) -> Response {
        ([(header::CONTENT_TYPE, HeaderValue::from_static(self.kind))], self.content).into_response()
    }
}

#[cfg(test)]
mod tests {
    use ganglion_proto::record::EventKind;

    /// Names of kinds of events in a script: what `kind` is compared with, and the keys of tables.
    fn kinds(script: &str) -> Vec<&str> {
        let compared = script.split("kind === '").skip(1).filter_map(|rest| rest.split('\'').next());
        let part = |begin: &str, end: &str| {
            script.split(begin).nth(1).and_then(|rest| rest.split(end).next()).unwrap_or_default()
        };
        let marked = part("const MARKED = new Map([", "]);").split('[').skip(1);
        let marked = marked.filter_map(|entry| entry.split('\'').nth(1));
        let silent = part("const SILENT = new Set([", "]);").split('\'').skip(1).step_by(2);
        let described = part("const told = {\n", "}[event.kind]").lines();
        let described = described.filter_map(|line| line.trim().split_once(": () =>")).map(|(key, _)| key);
        compared.chain(marked).chain(silent).chain(described).collect()
    }

    #[test]
    fn scripts_name_only_kinds_of_events_that_there_are() {
        let mut count = 0;
        for asset in super::all().iter().filter(|asset| asset.path.ends_with(".js")) {
            for kind in kinds(asset.content) {
                assert!(EventKind::of(kind).is_some(), "{}: there is no kind of events {kind}", asset.path);
                count += 1;
            }
        }
        assert!(count > 50, "{count}");
    }
}
