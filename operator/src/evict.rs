//! Evicts pods, a bounded number at once. A refusal is an answer, not an error: it is remembered for the
//! message of the next pass.

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use k8s_openapi::{
    api::{core::v1::Pod, policy::v1::Eviction},
    apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions, Status},
};
use kube::{Api, Client, api::PostParams};
use osimage_planner::plan::PodRef;

use crate::error::ExecuteError;

/// Evictions in flight at once.
const AT_ONCE: usize = 10;

/// What came of a round of evictions.
#[derive(Debug, Default)]
pub struct Round {
    /// Accepted: these pods stop now.
    pub evicted: Vec<PodRef>,
    /// Refused, and what the API server said.
    pub refused: Vec<(PodRef, String)>,
    /// The first that could not be asked for.
    pub failed: Option<ExecuteError>,
}

/// What the API server said about one pod.
enum Answer {
    Evicted,
    Refused(String),
    /// No such pod any more: there is nothing to do.
    Gone,
}

/// Asks for the eviction of each pod once.
pub async fn round(client: &Client, pods: &[PodRef], grace_period_seconds: Option<i64>) -> Round {
    let mut answers = stream::iter(pods.to_vec())
        .map(|pod| async move {
            let answer = evict(client, &pod, grace_period_seconds).await;
            (pod, answer)
        })
        .buffer_unordered(AT_ONCE);
    let mut round = Round::default();
    while let Some((pod, answer)) = answers.next().await {
        match answer {
            Ok(Answer::Evicted) => round.evicted.push(pod),
            Ok(Answer::Refused(why)) => round.refused.push((pod, why)),
            Ok(Answer::Gone) => {}
            Err(source) => {
                let pod = format!("{}/{}", pod.namespace, pod.name);
                round.failed.get_or_insert(ExecuteError::EvictPod { pod, source });
            }
        }
    }
    round.evicted.sort();
    round.refused.sort();
    round
}

/// Not `Api::evict`: kube 5.0 sends the delete options under a name that the API server does not know
/// (`delete_options`), so that the grace period and, worse, the precondition would be lost without a word.
async fn evict(client: &Client, pod: &PodRef, grace_period_seconds: Option<i64>) -> Result<Answer, kube::Error> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    let eviction = Eviction {
        metadata: ObjectMeta {
            name: Some(pod.name.clone()),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        delete_options: Some(DeleteOptions {
            grace_period_seconds,
            preconditions: Some(Preconditions { uid: Some(pod.uid.clone()), resource_version: None }),
            ..DeleteOptions::default()
        }),
    };
    let reply: Result<Status, kube::Error> =
        api.create_subresource("eviction", &pod.name, &PostParams::default(), &eviction).await;
    match reply {
        Ok(_) => Ok(Answer::Evicted),
        Err(kube::Error::Api(status)) if status.code == 429 => Ok(Answer::Refused(status.message.clone())),
        // Gone, or (409) another pod has its name by now: the next pass sees what is there.
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(Answer::Gone),
        Err(error) => Err(error),
    }
}

/// Refusals by pod UID; `None` for pods whose eviction was accepted.
pub fn answers(round: &Round) -> BTreeMap<&str, Option<&str>> {
    let evicted = round.evicted.iter().map(|pod| (pod.uid.as_str(), None));
    let refused = round.refused.iter().map(|(pod, why)| (pod.uid.as_str(), Some(why.as_str())));
    evicted.chain(refused).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kube::Config;
    use serde_json::{Value, json};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time::{sleep, timeout},
    };

    use super::*;

    /// What a PodDisruptionBudget that allows nothing makes the API server say.
    fn refusal() -> String {
        let body = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "TooManyRequests", "code": 429,
            "message": "Cannot evict pod as it would violate the pod's disruption budget.",
            "details": {"causes": [{"reason": "DisruptionBudget", "message": "The disruption budget web needs 2 healthy pods and has 2 currently"}]}
        })
        .to_string();
        format!(
            "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: 10\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    /// Reads one request: its first line and its body.
    async fn request(stream: &mut TcpStream) -> (String, Value) {
        let mut read = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            let n = stream.read(&mut buffer).await.unwrap();
            read.extend_from_slice(&buffer[..n]);
            let text = String::from_utf8_lossy(&read);
            if let Some((head, body)) = text.split_once("\r\n\r\n")
                && let Ok(body) = serde_json::from_str(body)
            {
                return (head.lines().next().unwrap_or_default().to_owned(), body);
            }
        }
    }

    #[tokio::test]
    async fn a_refused_eviction_is_an_answer_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
        let client = crate::run::client(config).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let seen = request(&mut stream).await;
            stream.write_all(refusal().as_bytes()).await.unwrap();
            // A retry would come on this connection or on another one.
            let mut more = [0; 1];
            tokio::select! {
                _ = listener.accept() => panic!("asked again"),
                n = stream.read(&mut more) => assert_eq!(n.unwrap_or(0), 0, "asked again"),
                () = sleep(Duration::from_millis(300)) => {}
            }
            seen
        };
        let pods = [PodRef { namespace: "shop".into(), name: "web-1".into(), uid: "u".into() }];
        let asked = timeout(Duration::from_secs(2), round(&client, &pods, Some(33)));
        let (asked, (line, body)) = futures::join!(asked, server);
        let asked = asked.expect("answered at once");
        assert!(asked.failed.is_none() && asked.evicted.is_empty());
        assert_eq!(asked.refused[0].1, "Cannot evict pod as it would violate the pod's disruption budget.");
        assert!(line.starts_with("POST /api/v1/namespaces/shop/pods/web-1/eviction"), "{line}");
        assert_eq!(body["deleteOptions"], json!({"gracePeriodSeconds": 33, "preconditions": {"uid": "u"}}));
    }
}
