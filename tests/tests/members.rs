//! Members are counted where they are listed, and what cannot be counted changes nothing.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qjump::{
    agent::members::{Config, Members, watch},
    config::File,
};
use qjump_tests::{http::Server, nobody::Folder};
use tokio::{
    net::TcpListener,
    sync::watch::{self as channel, Receiver},
};

/// The section `[cluster.members]` with these lines, as a configuration file has it.
fn config(lines: &str) -> Result<Config> {
    let text = format!(
        "[cluster]\nlink-rate = \"10gbit\"\nmax-packet = 256\nepsilon = \"4us\"\n\n[cluster.members]\ninterval = \"1s\"\n{lines}\n"
    );
    let file = File::parse(&text).map_err(anyhow::Error::msg)?;
    file.members().cloned().context("no members")
}

/// Waits until what is known is as wanted.
async fn until(members: &mut Receiver<Members>, what: &str, wanted: impl Fn(&Members) -> bool) -> Result<Members> {
    let known = tokio::time::timeout(Duration::from_secs(30), members.wait_for(|members| wanted(members))).await;
    match known.map(|known| known.map(|known| known.clone())) {
        Ok(known) => Ok(known?),
        Err(_) => anyhow::bail!("{what}: {:?}", members.borrow()),
    }
}

fn start(config: Config, in_force: Option<u32>) -> Receiver<Members> {
    let (sender, receiver) = channel::channel(config.unknown());
    tokio::spawn(watch(config, in_force, sender));
    receiver
}

#[tokio::test]
async fn a_file_is_read_again_and_again() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.path("hosts");
    fs::write(&path, "a\nb # spare\n\nc\n")?;
    let mut members = start(config(&format!("file = \"{}\"\nhold = \"3s\"", path.display()))?, None);
    until(&mut members, "the first count", |members| members.hosts == Some(3)).await?;
    // More at once.
    fs::write(&path, "a\nb\nc\nd\ne\n")?;
    until(&mut members, "it grew", |members| members.hosts == Some(5)).await?;
    // Less later.
    fs::write(&path, "a\n")?;
    let held = until(&mut members, "it shrank", |members| members.counted == Some(1)).await?;
    ensure!(held.hosts == Some(5), "{held:?}");
    let begun = Instant::now();
    until(&mut members, "it counts", |members| members.hosts == Some(1)).await?;
    ensure!(begun.elapsed() > Duration::from_millis(2_500), "after {:?}", begun.elapsed());
    // Not at all: the last count stays, and grows old.
    fs::remove_file(&path)?;
    let lost = until(&mut members, "it is gone", |members| members.failure.is_some()).await?;
    ensure!(lost.hosts == Some(1) && lost.failure.as_ref().is_some_and(|why| why.contains("cannot read")), "{lost:?}");
    let answered = lost.answered.context("never answered")?;
    ensure!(lost.age(answered + Duration::from_secs(9)) == Some(Duration::from_secs(9)));
    // An empty list, as while somebody writes it, is not believed; nor is one that anybody may write.
    fs::write(&path, "# nobody\n")?;
    until(&mut members, "it is empty", |members| members.failure.as_ref().is_some_and(|why| why.contains("no member")))
        .await?;
    fs::write(&path, "a\nb\n")?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let open = until(&mut members, "it is open to all", |members| {
        members.failure.as_ref().is_some_and(|why| why.contains("chmod"))
    })
    .await?;
    ensure!(open.hosts == Some(1), "{open:?}");
    Ok(())
}

#[tokio::test]
async fn a_restart_does_not_shorten_the_hold() -> Result<()> {
    let folder = Folder::new()?;
    let path = folder.path("hosts");
    fs::write(&path, "a\nb\n")?;
    let mut members = start(config(&format!("file = \"{}\"", path.display()))?, Some(40));
    let known = until(&mut members, "the first count", |members| members.hosts.is_some()).await?;
    ensure!((known.hosts, known.counted) == (Some(40), Some(2)), "{known:?}");
    Ok(())
}

#[tokio::test]
async fn names_are_resolved() -> Result<()> {
    // What this machine calls itself, it can resolve without a network.
    let mut members = start(config("dns = \"localhost\"")?, None);
    let known = until(&mut members, "localhost", |members| members.hosts.is_some()).await?;
    ensure!(matches!(known.hosts, Some(1 | 2)) && known.source == "dns localhost", "{known:?}");
    let mut members = start(config("dns = \"no-such-name.invalid\"")?, None);
    let known = until(&mut members, "a name that is none", |members| members.failure.is_some()).await?;
    ensure!(known.hosts.is_none() && known.counted.is_none(), "{known:?}");
    Ok(())
}

#[tokio::test]
async fn a_url_gives_lines_or_json_and_errors_change_nothing() -> Result<()> {
    const OK: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
    let server = Server::new(&format!("{OK}Content-Length: 6\r\n\r\na\nb\nc\n"))?;
    let mut members = start(config(&format!("url = \"http://{}/members?rack=3\"\nmost = 9", server.address))?, None);
    until(&mut members, "lines", |members| members.hosts == Some(3)).await?;
    server.say(&format!("{OK}Transfer-Encoding: chunked\r\n\r\nf\r\n[\"a\",\"b\",\"c\",\"d\r\n2\r\n\"]\r\n0\r\n\r\n"));
    until(&mut members, "json in chunks", |members| members.hosts == Some(4)).await?;
    for (answer, part) in [
        ("HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n".to_owned(), "500"),
        ("HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n".to_owned(), "302"),
        (format!("{OK}Content-Length: 90\r\n\r\na\n"), "no whole answer"),
        (format!("{OK}\r\n<html>please log in</html>"), "neither lines nor"),
        (format!("{OK}\r\n[\"a\", "), "like an array"),
        (format!("{OK}\r\n\u{1}\n1\n2\n3\n4\n5\n6\n7\n8\n9\n"), "at most 9"),
        ("nonsense\r\n\r\n".to_owned(), "no proper answer"),
        (String::new(), "no proper answer"),
    ] {
        server.say(&answer);
        let known =
            until(&mut members, part, |members| members.failure.as_ref().is_some_and(|why| why.contains(part))).await?;
        ensure!(known.hosts == Some(4), "{answer}: {known:?}");
    }
    // Too long to be kept.
    server.say(&format!("{OK}\r\n{}", "0123456789abcde\n".repeat(1_100_000)));
    until(&mut members, "a list without an end", |members| {
        members.failure.as_ref().is_some_and(|why| why.contains("no whole answer"))
    })
    .await?;
    server.say(&format!("{OK}\r\na\nb\nc\nd\ne\n"));
    until(&mut members, "well again", |members| members.hosts == Some(5) && members.failure.is_none()).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut members = start(config(&format!("url = \"http://{}/\"", listener.local_addr()?))?, None);
    let (mut open, _) = listener.accept().await?;
    let known = until(&mut members, "silence", |members| members.failure.is_some()).await?;
    ensure!(known.failure.as_ref().is_some_and(|why| why.contains("no answer within 10 s")), "{known:?}");
    // It has hung up.
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncReadExt::read_to_end(&mut open, &mut rest)).await??;
    ensure!(rest.starts_with(b"GET / HTTP/1.1\r\n"), "{}", String::from_utf8_lossy(&rest));
    Ok(())
}
