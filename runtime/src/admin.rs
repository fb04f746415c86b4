//! The admin endpoint: `/metrics` from a registry, `/healthz` always 200, `/readyz` from a closure.
//!
//! It has no authentication and answers GET only: bind it to loopback, or to the pod's address.

use std::io;

use axum::{
    Router,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::net::TcpListener;

/// Serves on `address` (`host:port`) until the future is dropped. An empty address serves nothing, and never
/// resolves.
///
/// # Errors
/// When the address cannot be bound, or the listener breaks.
pub async fn serve<R>(address: &str, registry: Registry, ready: R) -> io::Result<()>
where
    R: Fn() -> bool + Clone + Send + Sync + 'static,
{
    if address.is_empty() {
        return std::future::pending().await;
    }
    let listener = TcpListener::bind(address).await?;
    serve_on(listener, registry, ready).await
}

/// As [`serve`], on a listener that is bound already.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_on<R>(listener: TcpListener, registry: Registry, ready: R) -> io::Result<()>
where
    R: Fn() -> bool + Clone + Send + Sync + 'static,
{
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "serves /metrics, /healthz and /readyz");
    }
    axum::serve(listener, router(registry, ready)).await
}

fn router<R>(registry: Registry, ready: R) -> Router
where
    R: Fn() -> bool + Clone + Send + Sync + 'static,
{
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route(
            "/readyz",
            get(move || {
                let is_ready = ready();
                async move {
                    match is_ready {
                        true => (StatusCode::OK, "ok\n"),
                        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
                    }
                }
            }),
        )
        .route("/metrics", get(async move || metrics(&registry)))
}

fn metrics(registry: &Registry) -> axum::response::Response {
    let encoder = TextEncoder::new();
    let mut body = Vec::new();
    match encoder.encode(&registry.gather(), &mut body) {
        Ok(()) => ([(header::CONTENT_TYPE, encoder.format_type().to_owned())], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use prometheus::IntCounter;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test]
    async fn tells_metrics_health_and_readiness() {
        let registry = Registry::new();
        let counter = IntCounter::new("osimage_test_total", "A test.").unwrap();
        registry.register(Box::new(counter.clone())).unwrap();
        counter.inc();
        let ready = Arc::new(AtomicBool::new(false));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let flag = ready.clone();
        let server = tokio::spawn(serve_on(listener, registry, move || flag.load(Ordering::Relaxed)));
        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 503"));
        ready.store(true, Ordering::Relaxed);
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(address, "/metrics").await.contains("osimage_test_total 1"));
        assert!(get(address, "/else").await.starts_with("HTTP/1.1 404"));
        server.abort();
    }
}
