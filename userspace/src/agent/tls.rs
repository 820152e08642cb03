//! TLS, for lists of members that are asked for by https: whether the server is the one that was named, by the authorities that
//! this host trusts, or by those of one file.

use std::{path::Path, sync::Arc};

use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};

use super::members::read_file;

/// Whom to trust: the authorities of the file `ca` (PEM), or those of this host.
///
/// # Errors
/// If that is nobody.
pub fn trust(ca: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let nobody = match ca {
        Some(path) => {
            let text = read_file(path).map_err(|error| format!("ca {}: {error}", path.display()))?;
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            let wrong = |error: &dyn std::fmt::Display| format!("ca {}: {error}", path.display());
            for certificate in certificates.map_err(|error| wrong(&error))? {
                roots.add(certificate).map_err(|error| wrong(&error))?;
            }
            format!("ca {}: there is no certificate in it (PEM)", path.display())
        }
        None => {
            // Some of a host's certificates may be of a kind that is not understood; the others count.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            "this host trusts no authority: install ca-certificates, or name a file with certificates: ca = \"...\""
                .to_owned()
        }
    };
    if roots.is_empty() {
        return Err(nobody);
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}

/// Speaks TLS with `host`, once it has shown who it is.
///
/// # Errors
/// If it is somebody else, or does not speak TLS.
pub async fn connect(stream: TcpStream, host: &str, trust: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, String> {
    let name =
        ServerName::try_from(host.to_owned()).map_err(|error| format!("'{host}' is no name of a server: {error}"))?;
    TlsConnector::from(trust).connect(name, stream).await.map_err(|error| format!("no TLS with {host}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        sync::watch,
    };
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{ServerConfig, pki_types::PrivateKeyDer},
    };

    use super::{super::members, *};

    /// Serves a list of three to whoever trusts it, as `localhost`; its port and its certificate.
    async fn serve() -> (u16, String) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(config));
            while let Ok((stream, _)) = listener.accept().await {
                // Who does not trust it goes away.
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\na\nb\nc\n").await;
            }
        });
        (port, made.cert.pem())
    }

    /// What the first answer is, by a configuration.
    async fn first_answer(section: &str) -> Result<u32, String> {
        let config: members::Config = toml::from_str(section).unwrap();
        let (sender, mut found) = watch::channel(config.unknown());
        let watching = tokio::spawn(members::watch(config, None, sender));
        found.changed().await.unwrap();
        watching.abort();
        let found = found.borrow().clone();
        found.failure.map_or_else(|| Ok(found.hosts.unwrap()), Err)
    }

    #[tokio::test]
    async fn a_list_is_had_from_the_one_who_is_trusted() {
        let (port, certificate) = serve().await;
        let folder = std::env::temp_dir().join(format!("qjump-tls-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let (ca, other) = (path("ca.pem", &certificate), path("other.pem", &serve().await.1));
        let (none, broken) = (path("none.pem", "# none\n"), path("broken.pem", &certificate.replace('M', "*")));
        let ask = |host: &str, ca: &str| {
            let section = format!("url = \"https://{host}:{port}/members\"\nca = \"{ca}\"");
            async move { first_answer(&section).await }
        };
        assert_eq!(ask("localhost", &ca).await, Ok(3));
        for (host, ca, part) in [
            ("localhost", other.as_str(), "no TLS with localhost: invalid peer certificate"),
            ("127.0.0.1", &ca, "not valid for name"),
            ("localhost", &none, "there is no certificate in it"),
            ("localhost", &broken, "broken.pem"),
            ("localhost", "/nonexistent/ca.pem", "cannot read it"),
        ] {
            let error = ask(host, ca).await.unwrap_err();
            assert!(error.contains(part), "{host} {ca}: {error}");
        }
        // Whoever asks by http is not understood, and who is asked by https and does not speak it neither.
        let error = first_answer(&format!("url = \"http://localhost:{port}/\"")).await.unwrap_err();
        assert!(error.contains("no proper answer"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }
}
