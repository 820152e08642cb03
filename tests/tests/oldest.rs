//! The oldest kernels: refused with the reason, and left as they were.

use anyhow::{Context, Result};
use qjump_tests::{
    kernel::has_compare_exchange,
    link::{Link, PLAN, failed, succeeded},
};
use serde_json::Value;

#[test]
fn a_kernel_without_compare_exchange_is_refused_and_left_alone() -> Result<()> {
    let link = Link::new()?;
    let before = link.tc_state()?;
    let mut arguments = vec!["load", "--interface", &link.device];
    arguments.extend(PLAN);
    let output = link.qjump(&arguments)?;
    let check = link.qjump(&[&["check", "--interface", &link.device, "--json"][..], &PLAN].concat())?;
    let report: Value = serde_json::from_slice(&check.stdout)?;
    let findings = report["findings"].as_array().context("no findings")?;
    let refused = findings.iter().any(|finding| {
        let text = [&finding["found"], &finding["remedy"]].map(Value::to_string).concat();
        finding["status"] == "unsupported" && finding["breaks"] == true && text.contains("Linux 5.12 or later")
    });
    assert_eq!(
        (report["holds"].as_bool(), refused),
        (Some(has_compare_exchange()), !has_compare_exchange()),
        "{report:#}"
    );
    if has_compare_exchange() {
        succeeded(&output)?;
        assert_eq!(link.status()?["attached"], true);
        return link.unload().map(drop);
    }
    let (status, error) = failed(&output);
    assert_eq!(status, 1);
    assert!(error.contains("qjump needs Linux 5.12 or later on x86-64, 5.18 on arm64"), "{error}");
    assert_eq!(link.tc_state()?, before);
    assert!(!link.pins().exist());
    Ok(())
}
