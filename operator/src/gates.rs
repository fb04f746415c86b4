//! Asks Prometheus and Alertmanager whether a node may be started (`rollout.gates`). What they say is kept for a moment,
//! so that a busy operator does not become a load on them. Whatever goes wrong here is an answer, "unknown", and never an
//! error: monitoring that is away holds a rollout and fails nothing.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::future::join_all;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use osimage_crds::{
    condition::bounded,
    osimage::{AlertmanagerGate, Gate, PrometheusGate},
};
use osimage_planner::fleet::{GateFacts, GateState};
use serde::Deserialize;
use tokio::time::timeout;

use crate::error::chain;

/// How long a gate may take to answer.
const LIMIT: Duration = Duration::from_secs(5);
/// How long an answer is good.
const KEPT: Duration = Duration::from_secs(15);
/// Bytes of an answer that are read.
const MAX_BODY: usize = 4 << 20;
/// Bytes of what an answer is reduced to.
const MAX_TEXT: usize = 256;

/// Clients, and the last answers.
pub struct Gates {
    http: Client<HttpConnector, Empty<Bytes>>,
    /// What is wrong with the certificates of this machine matters only to who asks by https.
    https: Result<Client<HttpsConnector<HttpConnector>, Empty<Bytes>>, String>,
    answers: Mutex<BTreeMap<String, Answer>>,
}

struct Answer {
    asked: Instant,
    state: GateState,
}

impl Gates {
    pub fn new() -> Self {
        // Gates are asked too seldom for a connection to be worth keeping.
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_max_idle_per_host(0);
        let https = HttpsConnectorBuilder::new().with_native_roots().map_err(|e| format!("no certificates: {e}"));
        Gates {
            http: builder.build_http(),
            https: https.map(|roots| builder.build(roots.https_only().enable_http1().build())),
            answers: Mutex::default(),
        }
    }

    /// What these gates say: now, or within the last seconds.
    pub async fn ask(&self, gates: &[Gate]) -> Vec<GateFacts> {
        join_all(gates.iter().map(async |gate| {
            let state = self.state(gate, LIMIT).await;
            GateFacts { name: gate.name.clone(), state }
        }))
        .await
    }

    async fn state(&self, gate: &Gate, limit: Duration) -> GateState {
        let key = format!("{:?} {:?}", gate.prometheus, gate.alertmanager);
        let asked = Instant::now();
        if let Some(state) = self.known(&key, asked) {
            return state;
        }
        let answer = timeout(limit, self.ask_one(gate)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs_f32())));
        let state = answer.unwrap_or_else(|why| GateState::Unknown(bounded(&why, MAX_TEXT)));
        self.note(key, Answer { asked, state: state.clone() });
        state
    }

    fn known(&self, key: &str, now: Instant) -> Option<GateState> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|_, answer| now.saturating_duration_since(answer.asked) < KEPT);
        answers.get(key).map(|answer| answer.state.clone())
    }

    fn note(&self, key: String, answer: Answer) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(key, answer);
    }

    async fn ask_one(&self, gate: &Gate) -> Result<GateState, String> {
        match gate {
            Gate { prometheus: Some(gate), .. } => {
                let (status, body) = self.get(&prometheus_url(gate)).await?;
                prometheus(status, &body)
            }
            Gate { alertmanager: Some(gate), .. } => {
                let (status, body) = self.get(&alertmanager_url(gate)).await?;
                alertmanager(status, &body)
            }
            Gate { prometheus: None, alertmanager: None, .. } => Err("it says nobody to ask".into()),
        }
    }

    async fn get(&self, url: &str) -> Result<(StatusCode, Bytes), String> {
        let uri: Uri = url.parse().map_err(|e| format!("not a URL: {e}"))?;
        let https = uri.scheme_str() == Some("https");
        let request = Request::get(uri)
            .header(header::USER_AGENT, "osimage-operator")
            .header(header::ACCEPT, "application/json")
            .body(Empty::new())
            .map_err(|e| e.to_string())?;
        let answer = match https {
            true => self.https.as_ref().map_err(Clone::clone)?.request(request).await,
            false => self.http.request(request).await,
        };
        let answer = answer.map_err(|e| chain(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
        Ok((status, body.map_err(|e| format!("its answer cannot be read: {e}"))?.to_bytes()))
    }
}

fn prometheus_url(gate: &PrometheusGate) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).append_pair("query", &gate.query).finish();
    format!("{}/api/v1/query?{query}", gate.url.trim_end_matches('/'))
}

fn alertmanager_url(gate: &AlertmanagerGate) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("active", "true").append_pair("silenced", "false").append_pair("inhibited", "false");
    for matcher in &gate.matchers {
        query.append_pair("filter", matcher);
    }
    format!("{}/api/v2/alerts?{}", gate.url.trim_end_matches('/'), query.finish())
}

/// An answer of `/api/v1/query`; errors have the same shape, with another HTTP status.
#[derive(Deserialize)]
struct QueryAnswer {
    #[serde(default)]
    error: String,
    #[serde(default)]
    warnings: Vec<String>,
    data: Option<QueryData>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct QueryData {
    result_type: String,
    result: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Series {
    metric: BTreeMap<String, String>,
}

fn prometheus(status: StatusCode, body: &[u8]) -> Result<GateState, String> {
    let answer = serde_json::from_slice::<QueryAnswer>(body);
    let (status, answer) = match (status, answer) {
        (StatusCode::OK, answer) => (status, answer.map_err(|_| "it does not answer as Prometheus does")?),
        (status, Ok(answer)) => return Err(format!("it answers {}: {}", status.as_u16(), answer.error)),
        (status, Err(_)) => return Err(format!("it answers {}", status.as_u16())),
    };
    let Some(QueryData { result_type, result }) = answer.data else {
        return Err(format!("it answers {} without data", status.as_u16()));
    };
    if result_type != "vector" {
        return Err(format!("the query yields a {result_type}, and has to yield a vector"));
    }
    let names: Result<Vec<String>, _> =
        result.into_iter().map(|series| serde_json::from_value::<Series>(series).map(|s| name_of(s.metric))).collect();
    let names = names.map_err(|_| "it does not answer as Prometheus does")?;
    match (names.is_empty(), answer.warnings.first()) {
        (false, _) => Ok(GateState::Closed(bounded(&format!("the query returns {}", counted(names)), MAX_TEXT))),
        // Of what is behind Prometheus something did not answer: nothing may be everything that is known.
        (true, Some(warning)) => Err(format!("it returns nothing, with a warning: {warning}")),
        (true, None) => Ok(GateState::Open),
    }
}

/// As PromQL writes it.
fn name_of(mut labels: BTreeMap<String, String>) -> String {
    let name = labels.remove("__name__").unwrap_or_default();
    if labels.is_empty() && !name.is_empty() {
        return name;
    }
    let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value:?}")).collect();
    format!("{name}{{{}}}", labels.join(", "))
}

#[derive(Deserialize)]
struct Alert {
    labels: BTreeMap<String, String>,
}

fn alertmanager(status: StatusCode, body: &[u8]) -> Result<GateState, String> {
    if status != StatusCode::OK {
        // It explains a matcher that it does not understand as one JSON string.
        let why = serde_json::from_slice::<String>(body).map(|why| format!(": {why}")).unwrap_or_default();
        return Err(format!("it answers {}{why}", status.as_u16()));
    }
    let alerts: Vec<Alert> = serde_json::from_slice(body).map_err(|_| "it does not answer as Alertmanager does")?;
    let name = |alert: Alert| alert.labels.get("alertname").cloned().unwrap_or_else(|| name_of(alert.labels));
    match alerts.is_empty() {
        true => Ok(GateState::Open),
        false => {
            let text = format!("firing: {}", counted(alerts.into_iter().map(name)));
            Ok(GateState::Closed(bounded(&text, MAX_TEXT)))
        }
    }
}

/// Names in a fixed order, each once, with how often: what has not changed reads the same.
fn counted(names: impl IntoIterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    let texts = counts.into_iter().map(|(name, n)| if n == 1 { name } else { format!("{name} ({n})") });
    texts.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// What the two answer.
    mod captured {
        pub const EMPTY: &str = r#"{"status":"success","data":{"resultType":"vector","result":[]}}"#;
        pub const VECTOR: &str = r#"{"status":"success","data":{"resultType":"vector","result":[
            {"metric":{"__name__":"up","instance":"10.0.0.7:9100","job":"node"},"value":[1767225600.123,"0"]},
            {"metric":{"__name__":"up","instance":"10.0.0.3:9100","job":"node"},"value":[1767225600.123,"0"]}]}}"#;
        pub const NAMELESS: &str = r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1767225600.123,"12.5"]}]}}"#;
        pub const SCALAR: &str = r#"{"status":"success","data":{"resultType":"scalar","result":[1767225600.123,"1"]}}"#;
        pub const PARTIAL: &str = r#"{"status":"success","data":{"resultType":"vector","result":[]},"warnings":["No StoreAPIs matched for this query"]}"#;
        pub const BAD_QUERY: &str = r#"{"status":"error","errorType":"bad_data","error":"invalid parameter \"query\": 1:4: parse error: unexpected end of input"}"#;
        pub const ALERTS: &str = r#"[
            {"annotations":{"summary":"Node is down"},"endsAt":"2026-01-01T00:05:00.000Z","fingerprint":"02e2a6f7a1f1a5a8",
             "receivers":[{"name":"pager"}],"startsAt":"2026-01-01T00:00:00.000Z",
             "status":{"inhibitedBy":[],"mutedBy":[],"silencedBy":[],"state":"active"},
             "updatedAt":"2026-01-01T00:01:00.000Z","generatorURL":"http://prometheus:9090/graph?g0.expr=up+%3D%3D+0",
             "labels":{"alertname":"NodeDown","instance":"10.0.0.7:9100","severity":"critical"}},
            {"annotations":{},"endsAt":"2026-01-01T00:05:00.000Z","fingerprint":"12e2a6f7a1f1a5a8","receivers":[{"name":"pager"}],
             "startsAt":"2026-01-01T00:00:00.000Z","status":{"inhibitedBy":[],"silencedBy":[],"state":"active"},
             "updatedAt":"2026-01-01T00:01:00.000Z","labels":{"alertname":"NodeDown","instance":"10.0.0.8:9100","severity":"critical"}},
            {"annotations":{},"endsAt":"2026-01-01T00:05:00.000Z","fingerprint":"22e2a6f7a1f1a5a8","receivers":[{"name":"pager"}],
             "startsAt":"2026-01-01T00:00:00.000Z","status":{"inhibitedBy":[],"silencedBy":[],"state":"active"},
             "updatedAt":"2026-01-01T00:01:00.000Z","labels":{"alertname":"EtcdSlow","severity":"critical"}}]"#;
        pub const BAD_MATCHER: &str = r#""bad matcher format: severity""#;
    }

    fn open() -> Result<GateState, String> {
        Ok(GateState::Open)
    }

    fn closed(why: &str) -> Result<GateState, String> {
        Ok(GateState::Closed(why.into()))
    }

    fn unknown(why: &str) -> Result<GateState, String> {
        Err(why.into())
    }

    #[test]
    fn prometheus_says_no_by_saying_anything() {
        let rows = [
            ("nothing", 200, captured::EMPTY, open()),
            (
                "two series, in a fixed order",
                200,
                captured::VECTOR,
                closed(
                    r#"the query returns up{instance="10.0.0.3:9100", job="node"}, up{instance="10.0.0.7:9100", job="node"}"#,
                ),
            ),
            ("a sum", 200, captured::NAMELESS, closed("the query returns {}")),
            ("a number", 200, captured::SCALAR, unknown("the query yields a scalar, and has to yield a vector")),
            (
                "nothing, but not of all",
                200,
                captured::PARTIAL,
                unknown("it returns nothing, with a warning: No StoreAPIs matched for this query"),
            ),
            (
                "a query that is none",
                400,
                captured::BAD_QUERY,
                unknown(r#"it answers 400: invalid parameter "query": 1:4: parse error: unexpected end of input"#),
            ),
            ("an error of something between", 502, "<html>Bad Gateway</html>", unknown("it answers 502")),
            ("something else", 200, "<html>Welcome</html>", unknown("it does not answer as Prometheus does")),
            ("half of an answer", 200, &captured::VECTOR[..80], unknown("it does not answer as Prometheus does")),
            ("another API", 200, r#"{"status":"success"}"#, unknown("it answers 200 without data")),
            ("a redirect", 302, "", unknown("it answers 302")),
        ];
        for (fact, status, body, expected) in rows {
            assert_eq!(prometheus(StatusCode::from_u16(status).unwrap(), body.as_bytes()), expected, "{fact}");
        }
    }

    #[test]
    fn alertmanager_says_no_by_an_alert() {
        let rows = [
            ("none", 200, "[]", open()),
            ("three of two names", 200, captured::ALERTS, closed("firing: EtcdSlow, NodeDown (2)")),
            ("without a name", 200, r#"[{"labels":{"a":"b"}}]"#, closed(r#"firing: {a="b"}"#)),
            ("a bad matcher", 400, captured::BAD_MATCHER, unknown("it answers 400: bad matcher format: severity")),
            (
                "the API of version 1",
                200,
                r#"{"status":"success","data":[]}"#,
                unknown("it does not answer as Alertmanager does"),
            ),
            ("nothing at all", 200, "", unknown("it does not answer as Alertmanager does")),
            ("broken", 503, "", unknown("it answers 503")),
        ];
        for (fact, status, body, expected) in rows {
            assert_eq!(alertmanager(StatusCode::from_u16(status).unwrap(), body.as_bytes()), expected, "{fact}");
        }
    }

    #[test]
    fn what_a_gate_says_is_bounded() {
        let alerts: Vec<_> =
            (0..1000).map(|n| serde_json::json!({"labels": {"alertname": format!("Alert{n}")}})).collect();
        let Ok(GateState::Closed(text)) = alertmanager(StatusCode::OK, &serde_json::to_vec(&alerts).unwrap()) else {
            panic!("not closed")
        };
        assert!(text.len() <= MAX_TEXT && text.starts_with("firing: Alert0, Alert1"), "{text}");
    }

    fn alerts_at(url: &str) -> Gate {
        let gate = AlertmanagerGate { url: url.into(), matchers: vec![r#"severity="critical""#.into(), "a!=b".into()] };
        Gate { name: "alerts".into(), prometheus: None, alertmanager: Some(gate) }
    }

    /// A server that counts and remembers what it is asked; `None`: never answers.
    async fn serve(answer: Option<&'static str>) -> (String, Arc<AtomicUsize>, Arc<Mutex<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (asked, line) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(String::new())));
        let (count, seen) = (Arc::clone(&asked), Arc::clone(&line));
        tokio::spawn(async move {
            let mut open = vec![];
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 2048];
                let n = stream.read(&mut request).await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let text = String::from_utf8_lossy(&request[..n]);
                text.lines().next().unwrap_or_default().clone_into(&mut seen.lock().unwrap());
                if let Some(body) = answer {
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                    stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
                }
                open.push(stream);
            }
        });
        (url, asked, line)
    }

    #[tokio::test]
    async fn a_gate_is_asked_once_for_a_while() {
        let (url, asked, line) = serve(Some("[]")).await;
        let gates = Gates::new();
        for _ in 0..3 {
            let facts = gates.ask(&[alerts_at(&format!("{url}/prefix/"))]).await;
            assert_eq!(facts, [GateFacts { name: "alerts".into(), state: GateState::Open }]);
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        assert_eq!(
            line.lock().unwrap().as_str(),
            "GET /prefix/api/v2/alerts?active=true&silenced=false&inhibited=false&filter=severity%3D%22critical%22&filter=a%21%3Db HTTP/1.1"
        );
        let key = gates.answers.lock().unwrap().keys().next().cloned().unwrap();
        assert!(gates.known(&key, Instant::now() + KEPT).is_none(), "it is asked anew then");
        assert!(gates.answers.lock().unwrap().is_empty(), "and nothing is kept of it");
    }

    #[tokio::test]
    async fn a_gate_that_hangs_is_unknown_within_the_limit() {
        let (url, asked, _) = serve(None).await;
        let (gates, begun) = (Gates::new(), Instant::now());
        let state = gates.state(&alerts_at(&url), Duration::from_millis(300)).await;
        assert_eq!(state, GateState::Unknown("no answer within 0.3 s".into()));
        assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
        assert_eq!(gates.state(&alerts_at(&url), LIMIT).await, state, "and is not asked again at once");
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_gate_that_is_not_there_is_unknown() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = closed.local_addr().unwrap();
        drop(closed);
        for url in [format!("http://{address}"), format!("https://{address}"), "http://[".into()] {
            let facts = Gates::new().ask(&[alerts_at(&url)]).await;
            assert!(matches!(&facts[0].state, GateState::Unknown(why) if !why.is_empty()), "{url}: {facts:?}");
        }
    }

    #[test]
    fn a_query_is_asked_as_it_is_written() {
        let gate = PrometheusGate { url: "https://p/".into(), query: r#"up{job="a+b"} == 0 & é"#.into() };
        let expected = "https://p/api/v1/query?query=up%7Bjob%3D%22a%2Bb%22%7D+%3D%3D+0+%26+%C3%A9";
        assert_eq!(prometheus_url(&gate), expected);
    }
}
