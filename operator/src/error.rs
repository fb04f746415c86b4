//! One error type per effectful step, variants named by the action that failed, and the few classes that
//! decide what happens next. Waiting is never an error; see [`osimage_planner::Hold`].

use kube::core::ParseExpressionError;

/// What an error means for the next try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The API server or the way to it is in trouble: try again soon.
    Transient,
    /// What we acted on is no longer so: look again at once. Normal with caches and with two operators.
    Conflict,
    /// An object is not what it must be: somebody has to change it, and that change wakes us.
    Invalid,
    /// We asked for something that can never be granted: a fault of ours, or of our rights.
    Bug,
}

impl Class {
    /// Every class, for metrics.
    pub const ALL: [Class; 4] = [Class::Transient, Class::Conflict, Class::Invalid, Class::Bug];

    /// One word for machines.
    pub const fn as_str(self) -> &'static str {
        match self {
            Class::Transient => "transient",
            Class::Conflict => "conflict",
            Class::Invalid => "invalid",
            Class::Bug => "bug",
        }
    }

    /// The class of what the API server said, or of what kept it from saying it.
    pub fn of(error: &kube::Error) -> Class {
        match error {
            kube::Error::Api(status) if status.is_conflict() || status.is_already_exists() => Class::Conflict,
            // The object we were about to change is gone: the view was stale.
            kube::Error::Api(status) if status.is_not_found() => Class::Conflict,
            kube::Error::Api(status) if status.is_forbidden() || status.is_invalid() => Class::Bug,
            kube::Error::Api(status) if matches!(status.code, 400 | 401 | 405 | 415) => Class::Bug,
            kube::Error::SerdeError(_) => Class::Invalid,
            kube::Error::BuildRequest(_) => Class::Bug,
            _ => Class::Transient,
        }
    }
}

/// Looking at the cluster.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    #[error("cannot read the OSImage")]
    ReadImage(#[source] kube::Error),
    #[error("cannot read node {node}, which is in a slot, or its NodeOS")]
    ReadSlot { node: String, source: kube::Error },
    #[error("the slot book was written while the nodes in it were read")]
    BookMoved,
    #[error("cannot look up OSImage {name}, which owns the NodeOS of a node")]
    ReadOwner { name: String, source: kube::Error },
    #[error("spec.nodeSelector is not a label selector")]
    ParseSelector(#[source] ParseExpressionError),
    #[error("cannot list VolumeAttachments")]
    ListVolumeAttachments(#[source] kube::Error),
    #[error("cannot read PersistentVolume {volume}")]
    ReadVolume { volume: String, source: kube::Error },
    #[error("cannot list the pods of node {node}")]
    ListPods { node: String, source: kube::Error },
}

/// Writing the status.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("cannot write the status of the OSImage")]
    ReplaceStatus(#[source] kube::Error),
}

/// Carrying out a step.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    #[error("cannot change the finalizer of the OSImage")]
    PatchFinalizer(#[source] kube::Error),
    #[error("cannot make NodeOS {node}")]
    CreateNodeOS { node: String, source: kube::Error },
    #[error("NodeOS {node} cannot be read, and is in the way: {why}")]
    NodeOSUnreadable { node: String, why: String },
    #[error("cannot replace NodeOS {node}")]
    ReplaceNodeOS { node: String, source: kube::Error },
    #[error("cannot delete NodeOS {node}")]
    DeleteNodeOS { node: String, source: kube::Error },
    #[error("cannot cordon node {node}")]
    CordonNode { node: String, source: kube::Error },
    #[error("cannot uncordon node {node}")]
    UncordonNode { node: String, source: kube::Error },
    #[error("cannot delete pod {pod}")]
    DeletePod { pod: String, source: kube::Error },
    #[error("cannot evict pod {pod}")]
    EvictPod { pod: String, source: kube::Error },
    #[error("a NodeOS to replace carries no resourceVersion")]
    VersionMissing,
}

/// One pass over one OSImage.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Observe(#[from] ObserveError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    #[error("the pass took too long and was cut")]
    TookTooLong,
}

impl ReconcileError {
    /// What it means for the next try.
    pub fn class(&self) -> Class {
        match self {
            ReconcileError::Observe(error) => error.class(),
            ReconcileError::Publish(PublishError::ReplaceStatus(source)) => Class::of(source),
            ReconcileError::Execute(error) => error.class(),
            ReconcileError::TookTooLong => Class::Transient,
        }
    }
}

impl ObserveError {
    fn class(&self) -> Class {
        match self {
            ObserveError::ParseSelector(_) => Class::Invalid,
            ObserveError::BookMoved => Class::Conflict,
            ObserveError::ReadImage(source)
            | ObserveError::ListVolumeAttachments(source)
            | ObserveError::ReadVolume { source, .. }
            | ObserveError::ReadSlot { source, .. }
            | ObserveError::ReadOwner { source, .. }
            | ObserveError::ListPods { source, .. } => Class::of(source),
        }
    }
}

impl ExecuteError {
    fn class(&self) -> Class {
        match self {
            ExecuteError::NodeOSUnreadable { .. } => Class::Invalid,
            ExecuteError::VersionMissing => Class::Bug,
            ExecuteError::PatchFinalizer(source)
            | ExecuteError::CreateNodeOS { source, .. }
            | ExecuteError::ReplaceNodeOS { source, .. }
            | ExecuteError::DeleteNodeOS { source, .. }
            | ExecuteError::CordonNode { source, .. }
            | ExecuteError::UncordonNode { source, .. }
            | ExecuteError::DeletePod { source, .. }
            | ExecuteError::EvictPod { source, .. } => Class::of(source),
        }
    }
}

/// An error with all its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::core::{Status, response::reason};

    use super::*;

    fn api(reason: &str, code: u16) -> kube::Error {
        kube::Error::Api(Box::new(Status::failure("said so", reason).with_code(code)))
    }

    #[test]
    fn what_the_server_says_decides_when_we_come_back() {
        let cases = [
            ("somebody else wrote", api(reason::CONFLICT, 409), Class::Conflict),
            ("somebody else made it", api(reason::ALREADY_EXISTS, 409), Class::Conflict),
            ("it is gone", api(reason::NOT_FOUND, 404), Class::Conflict),
            ("we lack the right", api(reason::FORBIDDEN, 403), Class::Bug),
            ("we are nobody", api("Unauthorized", 401), Class::Bug),
            ("the schema refuses it", api(reason::INVALID, 422), Class::Bug),
            ("the request makes no sense", api("BadRequest", 400), Class::Bug),
            ("too many requests", api("TooManyRequests", 429), Class::Transient),
            ("etcd is slow", api("Timeout", 504), Class::Transient),
            ("no server", kube::Error::Service("connection refused".into()), Class::Transient),
            ("not our type", kube::Error::SerdeError(serde_json::from_str::<u8>("x").unwrap_err()), Class::Invalid),
        ];
        for (what, error, class) in cases {
            assert_eq!(Class::of(&error), class, "{what}");
        }
    }

    #[test]
    fn each_step_keeps_the_class_of_its_cause() {
        let node = || "n".to_owned();
        let cases: [(ReconcileError, Class); 5] = [
            (PublishError::ReplaceStatus(api(reason::CONFLICT, 409)).into(), Class::Conflict),
            (ObserveError::ParseSelector(ParseExpressionError("x".into())).into(), Class::Invalid),
            (ExecuteError::VersionMissing.into(), Class::Bug),
            (
                ExecuteError::CreateNodeOS { node: node(), source: api(reason::ALREADY_EXISTS, 409) }.into(),
                Class::Conflict,
            ),
            (ExecuteError::EvictPod { pod: node(), source: api("InternalError", 500) }.into(), Class::Transient),
        ];
        for (error, class) in cases {
            assert_eq!(error.class(), class, "{error}");
        }
    }

    #[test]
    fn a_chain_tells_every_cause() {
        let error = ReconcileError::from(ObserveError::ParseSelector(ParseExpressionError("Foo".into())));
        assert_eq!(
            chain(&error),
            "spec.nodeSelector is not a label selector: failed to parse value as expression: Foo"
        );
    }
}
