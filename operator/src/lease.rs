//! Leader election by a Lease (coordination.k8s.io).
//!
//! It keeps two operators from doing the same work twice and from filling the log with conflicts. It is **not**
//! what makes two operators safe: that is the slot book in the status of an OSImage, and the versions that
//! every write carries. So it may trust the clock of the holder, and losing it ends nothing: passes are
//! simply not carried out until it is ours again.
//!
//! [`evaluate`] decides, [`hold`] does. The renewal is one conditional PUT, without a read before it. These
//! renewals are the only writes of an operator at rest.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::{SignedDuration, Timestamp},
};
use kube::{Api, api::PostParams};
use osimage_crds::names;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::error::chain;

/// What to do about a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody holds it, or its holder has not renewed it in time: take it.
    Claim,
    /// It is ours.
    Renew,
    /// Somebody else holds it, for this long at least.
    Wait(Duration),
}

/// Decides about a lease as it was read; `None` when there is none yet.
pub fn evaluate(lease: Option<&LeaseSpec>, me: &str, now: Timestamp) -> Verdict {
    let Some(spec) = lease else { return Verdict::Claim };
    let Some(holder) = spec.holder_identity.as_deref().filter(|holder| !holder.is_empty()) else {
        return Verdict::Claim;
    };
    if holder == me {
        return Verdict::Renew;
    }
    let (Some(renewed), Some(seconds)) = (&spec.renew_time, spec.lease_duration_seconds) else {
        return Verdict::Claim;
    };
    let duration = SignedDuration::from_secs(seconds.into());
    // A holder whose clock is ahead of ours must not keep us waiting longer than its lease lasts.
    let left = (duration - now.duration_since(renewed.0)).min(duration);
    match Duration::try_from(left) {
        Ok(left) if !left.is_zero() => Verdict::Wait(left),
        _ => Verdict::Claim,
    }
}

/// The lease, and who wants it.
pub struct Election {
    /// Where the lease is.
    pub api: Api<Lease>,
    /// Its name.
    pub name: String,
    /// Who we are; different for every process.
    pub me: String,
    /// How long it lasts after its last renewal.
    pub duration: Duration,
}

/// One round at the table.
enum Turn {
    /// It is ours; as written, with its new version.
    Held(Box<Lease>),
    /// It is not, for this long at least.
    Waiting(Duration),
}

/// Takes and keeps the lease until told to stop, then gives it back. `leading` says how it stands.
pub async fn hold(election: Election, leading: watch::Sender<bool>, stop: impl Future<Output = ()>) {
    let renew_every = election.duration / 3;
    let give_up_after = election.duration * 2 / 3;
    let retry_every = election.duration / 8;
    let mut known: Option<Lease> = None;
    let mut good_until = Instant::now();
    tokio::pin!(stop);
    loop {
        let began = Instant::now();
        let pause = match timeout(renew_every, election.turn(known.take())).await {
            Ok(Ok(Turn::Held(lease))) => {
                known = Some(*lease);
                good_until = began + give_up_after;
                if turned(&leading, true) {
                    info!(lease = election.name, identity = election.me, "leading");
                }
                renew_every
            }
            Ok(Ok(Turn::Waiting(left))) => {
                good_until = began;
                left.clamp(retry_every, renew_every)
            }
            Ok(Err(error)) => {
                let error = chain(&error);
                warn!(lease = election.name, error, "cannot take or renew the lease");
                retry_every
            }
            Err(_) => {
                warn!(lease = election.name, "the API server did not answer in time about the lease");
                retry_every
            }
        };
        if Instant::now() >= good_until && turned(&leading, false) {
            warn!(
                lease = election.name,
                identity = election.me,
                "no longer leading; nothing is carried out until the lease is ours again"
            );
        }
        tokio::select! {
            () = sleep(pause) => {}
            () = &mut stop => break,
        }
    }
    if turned(&leading, false)
        && let Some(lease) = known
    {
        election.release(lease, retry_every).await;
    }
}

/// Says whether we lead, to those who listen only if that is new; tells whether it was.
fn turned(leading: &watch::Sender<bool>, leads: bool) -> bool {
    leading.send_if_modified(|led| std::mem::replace(led, leads) != leads)
}

impl Election {
    /// Renews the lease as it was last written, or reads it and decides.
    async fn turn(&self, known: Option<Lease>) -> Result<Turn, kube::Error> {
        let now = Timestamp::now();
        if let Some(lease) = known {
            match self.write(lease, Verdict::Renew, now).await {
                Ok(lease) => return Ok(Turn::Held(Box::new(lease))),
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => {
                    debug!(lease = self.name, "somebody else wrote the lease; looking again");
                }
                Err(error) => return Err(error),
            }
        }
        let found = self.api.get_opt(&self.name).await?;
        let verdict = evaluate(found.as_ref().and_then(|lease| lease.spec.as_ref()), &self.me, now);
        if let Verdict::Wait(left) = verdict {
            return Ok(Turn::Waiting(left));
        }
        match self.write(found.unwrap_or_default(), verdict, now).await {
            Ok(lease) => Ok(Turn::Held(Box::new(lease))),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
                Ok(Turn::Waiting(Duration::ZERO))
            }
            Err(error) => Err(error),
        }
    }

    /// Writes our name and the time, on condition that the lease is still as it was read.
    async fn write(&self, mut lease: Lease, verdict: Verdict, now: Timestamp) -> Result<Lease, kube::Error> {
        let spec = lease.spec.get_or_insert_default();
        spec.renew_time = Some(MicroTime(now));
        spec.lease_duration_seconds = Some(i32::try_from(self.duration.as_secs()).unwrap_or(i32::MAX).max(1));
        if verdict == Verdict::Claim {
            spec.holder_identity = Some(self.me.clone());
            spec.acquire_time = Some(MicroTime(now));
            spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |n| n.saturating_add(1)));
        }
        let params = PostParams { field_manager: Some(names::OPERATOR_MANAGER.into()), ..PostParams::default() };
        if lease.metadata.resource_version.is_some() {
            return self.api.replace(&self.name, &params, &lease).await;
        }
        lease.metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        self.api.create(&params, &lease).await
    }

    /// Gives the lease back, so that the next operator need not wait for its end.
    async fn release(&self, mut lease: Lease, patience: Duration) {
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        match timeout(patience, self.api.replace(&self.name, &PostParams::default(), &lease)).await {
            Ok(Ok(_)) => info!(lease = self.name, "gave the lease back"),
            Ok(Err(error)) => warn!(lease = self.name, error = chain(&error), "cannot give the lease back"),
            Err(_) => warn!(lease = self.name, "no answer while giving the lease back"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(holder: Option<&str>, renewed: i64, seconds: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: holder.map(Into::into),
            renew_time: Some(MicroTime(Timestamp::from_second(renewed).unwrap())),
            lease_duration_seconds: Some(seconds),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn a_lease_is_claimed_renewed_or_waited_for() {
        let no_times = LeaseSpec { holder_identity: Some("other".into()), ..LeaseSpec::default() };
        let cases = [
            ("there is none", None, Verdict::Claim),
            ("nobody holds it", Some(held(None, 100, 15)), Verdict::Claim),
            ("it was given back", Some(held(Some(""), 100, 15)), Verdict::Claim),
            ("it is ours", Some(held(Some("me"), 100, 15)), Verdict::Renew),
            ("it was ours and has run out", Some(held(Some("me"), 10, 15)), Verdict::Renew),
            ("another just renewed it", Some(held(Some("other"), 100, 15)), Verdict::Wait(Duration::from_secs(15))),
            (
                "another renewed it a while ago",
                Some(held(Some("other"), 90, 15)),
                Verdict::Wait(Duration::from_secs(5)),
            ),
            ("another's ran out this second", Some(held(Some("other"), 85, 15)), Verdict::Claim),
            ("another's ran out", Some(held(Some("other"), 10, 15)), Verdict::Claim),
            ("another's clock is ahead", Some(held(Some("other"), 900, 15)), Verdict::Wait(Duration::from_secs(15))),
            ("another never said until when", Some(no_times), Verdict::Claim),
        ];
        for (what, lease, verdict) in cases {
            assert_eq!(evaluate(lease.as_ref(), "me", Timestamp::from_second(100).unwrap()), verdict, "{what}");
        }
    }
}
