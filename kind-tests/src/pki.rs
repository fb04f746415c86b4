//! A throw-away certificate authority for one control plane.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// A certificate authority and the folder its files are in.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// Paths of a certificate and its key.
#[derive(Clone, Debug)]
pub struct CertFiles {
    /// PEM certificate.
    pub cert: PathBuf,
    /// PEM key.
    pub key: PathBuf,
}

impl Pki {
    /// Makes the authority and the key pair that signs service account tokens.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name("osimage-testbed-ca", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().context("make the CA's key")?;
        let cert = params.self_signed(&key).context("sign the CA")?;
        fs::write(dir.join("ca.crt"), cert.pem())?;

        let tokens = KeyPair::generate().context("make the token key")?;
        fs::write(dir.join("sa.key"), tokens.serialize_pem())?;
        fs::write(dir.join("sa.pub"), tokens.public_key_pem())?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// The authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// The private key for service account tokens.
    pub fn token_key(&self) -> PathBuf {
        self.dir.join("sa.key")
    }

    /// The public half of [`Pki::token_key`].
    pub fn token_public_key(&self) -> PathBuf {
        self.dir.join("sa.pub")
    }

    /// A serving certificate for the given names and addresses.
    pub fn server(&self, file: &str, names: &[&str]) -> Result<CertFiles> {
        let names = names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let mut params = CertificateParams::new(names).context("read the server's names")?;
        params.distinguished_name = name(file, None);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(file, params)
    }

    /// A client certificate: `user` is the Kubernetes user name, `group` its group.
    /// (One at most: rcgen keeps one organization per name.)
    pub fn client(&self, file: &str, user: &str, group: Option<&str>) -> Result<CertFiles> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(user, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(file, params)
    }

    fn issue(&self, file: &str, mut params: CertificateParams) -> Result<CertFiles> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        let key = KeyPair::generate().context("make a key")?;
        let cert = params.signed_by(&key, &self.issuer).with_context(|| format!("sign the certificate of {file}"))?;
        let files = CertFiles { cert: self.dir.join(format!("{file}.crt")), key: self.dir.join(format!("{file}.key")) };
        fs::write(&files.cert, cert.pem())?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}

fn name(common: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name
}
