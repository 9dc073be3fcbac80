//! Files of the page, built in: it loads nothing from elsewhere.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

/// A file with its content type.
pub struct Asset {
    /// Path at which it is served.
    pub path: &'static str,
    kind: &'static str,
    /// Content of the file.
    pub content: &'static str,
}

static ASSETS: [Asset; 6] = [
    Asset { path: "/", kind: "text/html; charset=utf-8", content: include_str!("assets/index.html") },
    Asset { path: "/style.css", kind: "text/css; charset=utf-8", content: include_str!("assets/style.css") },
    Asset { path: "/app.js", kind: "text/javascript; charset=utf-8", content: include_str!("assets/app.js") },
    Asset {
        path: "/chart.js",
        kind: "text/javascript; charset=utf-8",
        content: include_str!("assets/chart.js"),
    },
    Asset {
        path: "/timeline.js",
        kind: "text/javascript; charset=utf-8",
        content: include_str!("assets/timeline.js"),
    },
    Asset { path: "/icon.svg", kind: "image/svg+xml", content: include_str!("assets/icon.svg") },
];

/// All built-in files.
pub fn all() -> &'static [Asset] {
    &ASSETS
}

impl Asset {
    /// Answer with the file's content.
    pub fn answer(&self) -> Response {
        ([(header::CONTENT_TYPE, HeaderValue::from_static(self.kind))], self.content).into_response()
    }
}
