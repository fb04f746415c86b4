//! Sets up `tracing` once per process, on standard error.
//!
//! The filter is `RUST_LOG` where it is set and valid, else `info` with the chatter of the HTTP stack left out.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

const DEFAULT_FILTER: &str = "info,hyper=warn,h2=warn,rustls=warn,tower=warn";

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people: one line with a level, a message and `key=value` pairs.
    #[default]
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// Sets up logging for the rest of the process. A second call changes nothing.
pub fn init(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let layer = match format {
        LogFormat::Text => layer.with_target(false).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
    };
    // Fails only when a subscriber is set already, as in tests that run in one process.
    let _already_set = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
}
