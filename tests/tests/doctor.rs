//! `qjump doctor`: live proof that marks and counters are what they should be, and the truth where they are not.

use anyhow::{Context, Result};
use aya::programs::{LinkOrder, TcAttachType, tc::TcAttachOptions};
use qjump_tests::{
    kernel::{has_tcx, is_guest},
    link::{FAR, Link, PLAN, failed, succeeded},
    program::{classifier, lab},
};
use serde_json::{Value, json};

/// With those of [`PLAN`], levels of every kind: guaranteed, by bytes, for grants alone, unlimited.
const MORE_LEVELS: [&str; 4] = ["--level", "3:2,claims=grant-only", "--level", "2:unlimited"];

fn load(link: &Link, more: &[&str]) -> Result<()> {
    succeeded(&link.qjump(&[&["load", "--interface", &link.device][..], &PLAN, &MORE_LEVELS, more].concat())?).map(drop)
}

/// What the doctor says; the report must agree with the exit status.
fn doctor(link: &Link, more: &[&str], status: i32) -> Result<Vec<Value>> {
    let output = link.qjump(&[&["doctor", "--interface", &link.device, "--json"][..], more].concat())?;
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(report["holds"], status == 0, "{report:#}");
    report["levels"].as_array().cloned().context("no levels")
}

#[test]
fn every_level_is_marked_and_counted() -> Result<()> {
    let link = Link::with_ipv6()?;
    for queue in ["keep", "htb"] {
        load(&link, &["--queue", queue])?;
        for to in [&[][..], &["--to", FAR.0], &["--to", FAR.1]] {
            let levels = doctor(&link, to, 0)?;
            let marks: Vec<_> = levels.iter().map(|one| (one["level"].as_u64(), one["dscp_seen"].as_u64())).collect();
            let wanted = [(7, 56), (5, 40), (3, 0), (2, 16), (0, 0)].map(|(level, mark)| (Some(level), Some(mark)));
            assert_eq!(marks, wanted, "{levels:#?}");
            // What nobody granted it, the probe does not get.
            assert_eq!(levels[2]["counted"], json!(["not_granted"]));
        }
    }
    let text = succeeded(&link.qjump(&["doctor", "--interface", &link.device])?)?;
    assert_eq!(text.lines().filter(|line| line.ends_with("Ok")).count(), 5, "{text}");
    Ok(())
}

#[test]
fn what_is_wrong_is_said() -> Result<()> {
    let link = Link::new()?;
    let run = |arguments: &[&str]| link.qjump(&[&["doctor", "--interface", &link.device][..], arguments].concat());
    let (status, error) = failed(&run(&[])?);
    assert!(status == 1 && error.contains("not loaded"), "{error}");
    load(&link, &["--queue", "keep"])?;
    // Nobody is at this address, so that no probe leaves.
    link.near.ip(&format!("neigh replace 10.9.0.99 dev {} nud failed", link.device))?;
    let levels = doctor(&link, &["--to", "10.9.0.99"], 2)?;
    assert!(levels.iter().all(|one| one["fault"].is_string() && one["dscp_seen"].is_null()), "{levels:#?}");
    assert!(doctor(&link, &[], 0)?.iter().all(|one| one["fault"].is_null()));
    // Somebody's filter behind the program drops everything.
    let (device, drop) = (&link.device, "protocol all prio 9 matchall action drop");
    let clsact = link.near.batch("tc", &format!("qdisc add dev {device} clsact\n"));
    assert_eq!(clsact.is_ok(), has_tcx(), "without tcx, clsact is there already");
    if link.near.batch("tc", &format!("filter add dev {device} egress {drop}\n")).is_ok() {
        let levels = doctor(&link, &[], 2)?;
        assert!(levels.iter().all(|one| one["dscp_seen"].is_null() && one["counted"] != json!([])), "{levels:#?}");
        link.near.batch("tc", &format!("filter del dev {device} egress prio 9\n"))?;
    } else {
        assert!(!is_guest(), "a guest has cls_matchall and act_gact");
    }
    assert!(doctor(&link, &[], 0)?.iter().all(|one| one["fault"].is_null()));
    // Somebody's program in front of it. Without tcx, that place is the program's own.
    if !has_tcx() {
        return Ok(());
    }
    let mut other = lab("qj_drop")?;
    link.near.enter(|| {
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        classifier(&mut other, "qj_drop")?.attach_with_options(&link.device, TcAttachType::Egress, options)?;
        Ok(())
    })?;
    let levels = doctor(&link, &[], 2)?;
    assert!(levels.iter().all(|one| one["counted"] == json!([])), "{levels:#?}");
    assert!(levels[0]["fault"].as_str().context("a fault")?.contains("neither program nor wire"), "{levels:#?}");
    Ok(())
}
