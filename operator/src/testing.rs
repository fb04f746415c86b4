//! What tests of several files share: objects, and a server that expects a list of exchanges.

use std::sync::Arc;

use http::{Method, Request, Response};
use kube::{Client, client::Body};
use osimage_crds::{NodeOS, OSImage};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    context::{Context, Refusals},
    events::Teller,
    gates::Gates,
    metrics::Metrics,
    stores::Stores,
};

/// An OSImage `web` with UID `u1` at version 7 that selects pool a, held by our finalizer and by another.
pub fn image() -> OSImage {
    serde_json::from_value(json!({
        "apiVersion": "osimage.dev/v1alpha1", "kind": "OSImage",
        "metadata": {"name": "web", "uid": "u1", "resourceVersion": "7", "generation": 1,
                     "finalizers": ["other/one", "osimage.dev/unwind"]},
        "spec": {
            "image": {"ostree": {"url": "https://x/repo", "commit": "0123456789abcdef".repeat(4),
                                 "verification": {"insecureSkip": true}}},
            "nodeSelector": {"matchLabels": {"pool": "a"}}
        }
    }))
    .unwrap()
}

/// A NodeOS of that OSImage.
pub fn node_os(name: &str, version: Option<&str>) -> NodeOS {
    serde_json::from_value(json!({
        "apiVersion": "osimage.dev/v1alpha1", "kind": "NodeOS",
        "metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": version},
        "spec": {"osImage": {"name": "web", "uid": "u1"}}
    }))
    .unwrap()
}

/// One request that is expected, and the reply: an object, or a failure of this code.
pub struct Exchange {
    method: Method,
    path: String,
    /// `None`: whatever it is.
    body: Option<Value>,
    reply: Result<Value, u16>,
}

impl Exchange {
    pub fn new(method: Method, path: &str, body: Value, reply: Result<Value, u16>) -> Self {
        Exchange { method, path: path.into(), body: Some(body), reply }
    }

    pub fn any_body(self) -> Self {
        Exchange { body: None, ..self }
    }

    fn response(self) -> Response<Body> {
        let (code, body) = match self.reply {
            Ok(body) => (200, body),
            Err(code) => {
                let reason = match code {
                    404 => "NotFound",
                    409 => "Conflict",
                    _ => "Unknown",
                };
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                                    "message": "said so", "reason": reason, "code": code});
                (code, status)
            }
        };
        Response::builder().status(code).body(Body::from(body.to_string().into_bytes())).unwrap()
    }
}

/// A context of a leader with empty stores.
pub fn context(client: Client, stores: Stores) -> Context {
    let (lead, leading) = watch::channel(true);
    drop(lead);
    Context {
        teller: Teller::new(client.clone(), "test".into()),
        client,
        stores,
        metrics: Metrics::new(&Registry::new()).unwrap(),
        refusals: Refusals::default(),
        gates: Gates::new(),
        own: crate::context::Own::default(),
        leading,
    }
}

/// Runs something against a server that expects exactly these exchanges, in this order.
pub async fn on_the_wire<T>(exchanges: Vec<Exchange>, run: impl AsyncFnOnce(Arc<Context>) -> T) -> T {
    on_the_wire_with(Stores::holding(vec![], vec![]), exchanges, run).await
}

/// As [`on_the_wire`], with stores that hold something.
pub async fn on_the_wire_with<T>(
    stores: Stores,
    exchanges: Vec<Exchange>,
    run: impl AsyncFnOnce(Arc<Context>) -> T,
) -> T {
    let (service, mut handle) = tower_test::mock::pair::<Request<Body>, Response<Body>>();
    let server = tokio::spawn(async move {
        for exchange in exchanges {
            let (request, respond) = handle.next_request().await.expect("a request");
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap();
            let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            assert_eq!((&head.method, head.uri.to_string().as_str()), (&exchange.method, exchange.path.as_str()));
            if let Some(expected) = &exchange.body {
                assert_eq!(&body, expected);
            }
            respond.send_response(exchange.response());
        }
        assert!(handle.next_request().await.is_none(), "one request too many");
    });
    let ctx = Arc::new(context(Client::new(service, "default"), stores));
    let result = run(ctx).await;
    server.await.unwrap();
    result
}
