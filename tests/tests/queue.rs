//! The host's queue under `load`, `status` and `unload`: set up, replaced, watched, put back.

use anyhow::Result;
use qjump_tests::{
    kernel::has_tcx,
    link::{Link, failed, succeeded},
};
use serde_json::{Value, json};

/// A plan for TCP: level 5 with bursts of a few frames, level 7 guaranteed.
const PLAN: [&str; 12] = [
    "--hosts",
    "2",
    "--link-rate",
    "100mbit",
    "--max-packet",
    "256",
    "--epsilon",
    "1ms",
    "--level",
    "7:1",
    "--level",
    "5:20mbit,burst=9000",
];

fn load(link: &Link, more: &[&str]) -> Result<std::process::Output> {
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(PLAN);
    arguments.extend(more);
    link.qjump(&arguments)
}

/// The root qdisc and GSO limit of the near interface, as iproute2 shows them.
fn host_state(link: &Link) -> Result<String> {
    let tc = link.near.command("tc").args(["-d", "qdisc", "show", "dev", &link.device]).output()?;
    let ip = link.near.command("ip").args(["-d", "-j", "link", "show", "dev", &link.device]).output()?;
    let ip: Value = serde_json::from_slice(&ip.stdout)?;
    // Where the program is attached on a kernel without tcx; it is no queue.
    let queues: Vec<String> = succeeded(&tc)?
        .lines()
        .filter(|line| !line.starts_with("qdisc clsact"))
        .map(|line| format!("{line}\n"))
        .collect();
    Ok(format!("{}gso_max_segs {}", queues.concat(), ip[0]["gso_max_segs"]))
}

#[test]
fn loads_and_unloads_leave_the_queue_as_they_found_it() -> Result<()> {
    let link = Link::new()?;
    link.near.ip(&format!("link set {} gso_max_segs 40", link.device))?;
    for root in ["", "handle 7: pfifo limit 37", "handle 8: tbf rate 90mbit burst 20kb limit 64kb"] {
        if !root.is_empty() {
            link.near.batch("tc", &format!("qdisc replace dev {} root {root}\n", link.device))?;
        }
        let before = host_state(&link)?;
        let said = succeeded(&load(&link, &["--queue", "htb"])?)?;
        assert!(said.contains("packets wait in htb"), "{said}");
        // 9000 bytes are five frames; half of them for one packet, the other half for late timers.
        assert!(said.contains("at most 2 segments"), "{said}");
        assert!(said.contains("level 5: packets have at most 4476 B") && !said.contains("level 7: packets"), "{said}");
        assert!(host_state(&link)?.contains("htb 716a:"), "{}", host_state(&link)?);
        assert!(host_state(&link)?.ends_with("gso_max_segs 2"));
        let loaded = host_state(&link)?;
        // Again, and again with other rates: the same queue.
        succeeded(&load(&link, &["--queue", "htb"])?)?;
        assert_eq!(host_state(&link)?, loaded);
        let status = link.status()?;
        assert_eq!((&status["queue"], &status["queue_problems"]), (&json!("htb"), &json!([])));
        assert_eq!(status["queue_why"], "--queue asks for it");
        let paced = status["levels"].as_array().unwrap().iter().filter(|level| level["over"] == "pace").count();
        assert_eq!(paced, 2);
        // To keep and back, and then away.
        succeeded(&load(&link, &["--queue", "keep"])?)?;
        assert_eq!(host_state(&link)?, before);
        assert_eq!(link.status()?["queue"], "keep");
        succeeded(&load(&link, &["--queue", "htb"])?)?;
        assert_eq!(host_state(&link)?, loaded);
        link.unload()?;
        assert_eq!(host_state(&link)?, before);
    }
    Ok(())
}

#[test]
fn what_somebody_else_has_set_up_is_left_alone() -> Result<()> {
    let link = Link::new()?;
    let device = &link.device;
    let theirs = format!(
        "qdisc replace dev {device} root handle 9: htb default 1\n\
         class add dev {device} parent 9: classid 9:1 htb rate 50mbit\n"
    );
    link.near.batch("tc", &theirs)?;
    let before = host_state(&link)?;
    let (status, message) = failed(&load(&link, &["--queue", "htb"])?);
    assert_eq!(status, 1);
    assert!(message.contains("htb 9:") && message.contains("--queue keep"), "{message}");
    assert_eq!(host_state(&link)?, before);
    let said = succeeded(&load(&link, &[])?)?;
    assert!(said.contains("packets are dropped: its queue is htb 9: of somebody else"), "{said}");
    assert_eq!(host_state(&link)?, before);
    link.unload()?;
    assert_eq!(host_state(&link)?, before);
    Ok(())
}

#[test]
fn a_queue_that_is_taken_away_is_noticed_and_made_again() -> Result<()> {
    let link = Link::new()?;
    let device = &link.device;
    succeeded(&load(&link, &["--queue", "htb"])?)?;
    link.near.batch("tc", &format!("class change dev {device} classid 716a:6 htb rate 90mbit\n"))?;
    let (status, _) = failed(&link.qjump(&["status", "--interface", device])?);
    assert_eq!(status, 2);
    assert!(link.status()?["queue_problems"][0].as_str().is_some_and(|what| what.contains("716a:6")));
    link.near.batch("tc", &format!("qdisc del dev {device} root\n"))?;
    assert!(link.status()?["queue_problems"][0].as_str().is_some_and(|what| what.contains("default")));
    succeeded(&load(&link, &["--queue", "htb"])?)?;
    assert_eq!(link.status()?["queue_problems"], json!([]));
    // Somebody else's root that came later stays when qjump goes.
    link.near.batch("tc", &format!("qdisc replace dev {device} root handle 5: pfifo limit 9\n"))?;
    link.unload()?;
    assert!(host_state(&link)?.contains("pfifo 5:"), "{}", host_state(&link)?);
    Ok(())
}

#[test]
fn queues_that_cannot_be_are_refused_with_the_remedy() -> Result<()> {
    let link = Link::new()?;
    let before = host_state(&link)?;
    for (more, code, parts) in [
        (&["--queue", "keep", "--level", "3:1mbit,over=pace"][..], 64, &["level 3", "paced", "--queue htb"][..]),
        (&["--host-rate", "10mbit"], 64, &["10mbit is less than what the levels may send together"]),
        (&["--queue", "keep", "--host-rate", "50mbit"], 64, &["--host-rate", "keep"]),
        (&["--queue", "fq", "--host-rate", "50mbit"], 64, &["--host-rate", "--queue htb"]),
        (&["--queue", "best"], 64, &["auto", "fq", "htb", "keep"]),
        (&["--host-rate", "fast"], 64, &["fast"]),
        (&["--level", "3:1mbit,over=wait"], 64, &["wait"]),
    ] {
        let (status, message) = failed(&load(&link, more)?);
        assert_eq!(status, code, "{more:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{more:?}: {message}");
        }
        assert_eq!(host_state(&link)?, before, "{more:?}");
        assert!(!link.pins().exist(), "{more:?}");
    }
    Ok(())
}

/// Takes the program off the interface, and nothing else.
fn detach(link: &Link) -> Result<()> {
    if has_tcx() {
        return Ok(std::fs::remove_file(link.pins().link())?);
    }
    link.near.batch("tc", &format!("filter del dev {} egress\n", link.device))
}

/// What a load finds of an earlier one that is no longer in force is put back first, so that what was there
/// before that one comes back in the end.
#[test]
fn what_an_interrupted_load_left_is_put_back() -> Result<()> {
    let link = Link::new()?;
    let device = &link.device;
    link.near.ip(&format!("link set {device} gso_max_segs 40"))?;
    link.near.batch("tc", &format!("qdisc replace dev {device} root handle 7: pfifo limit 37\n"))?;
    let before = host_state(&link)?;
    succeeded(&load(&link, &["--queue", "htb"])?)?;
    // As if it had been killed before it attached.
    detach(&link)?;
    assert!(host_state(&link)?.contains("htb 716a:"));
    let said = succeeded(&load(&link, &["--queue", "htb"])?)?;
    assert!(said.contains("removing what an earlier load had left"), "{said}");
    link.unload()?;
    assert_eq!(host_state(&link)?, before);
    // And where unload is what comes next.
    succeeded(&load(&link, &["--queue", "htb"])?)?;
    detach(&link)?;
    link.unload()?;
    assert_eq!(host_state(&link)?, before);
    Ok(())
}
