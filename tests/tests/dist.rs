//! The package: installed, upgraded and purged in a system of its own, and what it brings.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use qjump_tests::{
    link::{Link, PLAN, binary, failed, succeeded},
    root::Root,
};
use serde_json::Value;

/// The package that `cargo xtask dist` has made.
fn package() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("QJUMP_DEB") {
        return Ok(path.into());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}; run `cargo xtask dist`", folder.display()))?;
    let mut packages = entries.filter_map(|entry| Some(entry.ok()?.path()));
    packages.find(|path| path.extension().is_some_and(|extension| extension == "deb")).context("no .deb there")
}

/// A folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("qjump-dist-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    succeeded(&Command::new(program).args(arguments).output()?).with_context(|| format!("{program} {arguments:?}"))
}

/// The same package with a higher version.
fn next_version(package: &Path, folder: &Scratch) -> Result<PathBuf> {
    let files = folder.0.join("files");
    let (from, files_text) = (package.to_str().context("a path")?, files.to_str().context("a path")?);
    run("dpkg-deb", &["-R", from, files_text])?;
    let control = files.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let version = text.lines().find_map(|line| line.strip_prefix("Version: ")).context("a version")?;
    fs::write(&control, text.replace(&format!("Version: {version}"), &format!("Version: {version}+next")))?;
    let to = folder.0.join("next.deb");
    run("dpkg-deb", &["--root-owner-group", "-Zxz", "-b", files_text, to.to_str().context("a path")?])?;
    Ok(to)
}

/// A system with the package, beside a cable.
struct Installed {
    link: Link,
    root: Root,
}

impl Installed {
    fn new() -> Result<Self> {
        let installed = Self { link: Link::new()?, root: Root::new()? };
        let package = installed.root.bring(&package()?)?;
        installed.run(&["dpkg", "--install", &package])?;
        Ok(installed)
    }

    fn output(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.root.command(&self.link.near, arguments).output()?)
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        succeeded(&self.output(arguments)?).with_context(|| format!("{arguments:?}"))
    }

    fn load(&self, more: &[&str]) -> Result<String> {
        self.run(&[&["qjump", "load", "--interface", &self.link.device], &PLAN[..], more].concat())
    }

    fn status(&self) -> Result<Value> {
        let json = self.run(&["qjump", "status", "--interface", &self.link.device, "--json"])?;
        Ok(serde_json::from_str::<Value>(&json)?["interfaces"][0].take())
    }
}

#[test]
fn everything_is_in_its_place() -> Result<()> {
    let machine = || ["/etc/group", "/var/lib/dpkg/status"].map(fs::read_to_string);
    let before = machine().into_iter().collect::<Result<Vec<_>, _>>()?;
    let installed = Installed::new()?;
    let root = &installed.root;
    let multiarch = format!("{}-linux-gnu", std::env::consts::ARCH);
    let library = format!("/usr/lib/{multiarch}/libqjump_preload.so");
    for (file, mode) in [
        ("/usr/bin/qjump", 0o755),
        (library.as_str(), 0o644),
        ("/usr/lib/systemd/system/qjump.service", 0o644),
        ("/usr/share/qjump/qjump.schema.json", 0o644),
        ("/usr/share/bash-completion/completions/qjump", 0o644),
        ("/usr/share/zsh/vendor-completions/_qjump", 0o644),
        ("/usr/share/fish/vendor_completions.d/qjump.fish", 0o644),
        ("/usr/share/doc/qjump/copyright", 0o644),
        ("/usr/share/doc/qjump/changelog.gz", 0o644),
    ] {
        let metadata = fs::metadata(root.file(file)).with_context(|| file.to_owned())?;
        assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{file}");
    }
    // It does not say what is to be enforced, and what it shows as an example can be planned.
    assert!(root.file("/etc/qjump").is_dir() && !root.file("/etc/qjump/qjump.toml").exists());
    installed.run(&["qjump", "plan", "--config", "/usr/share/doc/qjump/examples/qjump.toml"])?;
    assert!(fs::read_to_string(root.file("/etc/group"))?.contains("\nqjump:"));
    // This machine itself knows nothing of it.
    assert_eq!(machine().into_iter().collect::<Result<Vec<_>, _>>()?, before);
    // The library has its place in the loader's own terms, whatever the architecture.
    let said = installed.run(&["env", "LD_PRELOAD=libqjump_preload.so", "QJUMP_LEVEL=5", "true"])?;
    assert_eq!(said, "");
    Ok(())
}

#[test]
fn enforcement_survives_the_upgrade_and_a_purge_gives_the_interface_back() -> Result<()> {
    let installed = Installed::new()?;
    let before = installed.link.tc_state()?;
    installed.load(&["--queue", "htb"])?;
    // Something to count.
    let link = &installed.link;
    succeeded(
        &link.near.command("ping").args(["-c", "3", "-i", "0.01", "-Q", "0", qjump_tests::link::FAR.0]).output()?,
    )?;
    let old = installed.status()?;
    assert_eq!(old["attached"], true);

    let folder = Scratch::new("upgrade")?;
    let next = installed.root.bring(&next_version(&package()?, &folder)?)?;
    installed.run(&["dpkg", "--install", &next])?;
    ensure!(installed.run(&["dpkg-query", "-W", "qjump"])?.contains("+next"), "not upgraded");
    let new = installed.status()?;
    for field in ["attached", "generation", "program_id", "queue", "queue_problems"] {
        assert_eq!(new[field], old[field], "{field}");
    }
    let passed = |status: &Value| {
        let levels = status["levels"].as_array().map(Vec::as_slice).unwrap_or_default();
        levels.iter().find(|level| level["level"] == 0).and_then(|level| level["passed_packets"].as_u64())
    };
    assert!(passed(&new) >= passed(&old) && passed(&old) >= Some(3), "{old} {new}");

    installed.run(&["dpkg", "--purge", "qjump"])?;
    assert_eq!(link.tc_state()?, before);
    let root = &installed.root;
    for gone in ["/usr/bin/qjump", "/etc/qjump", "/run/qjump", "/sys/fs/bpf/qjump", "/sys/fs/bpf/qjump-tags"] {
        assert!(!root.file(gone).exists(), "{gone}");
    }
    assert!(!fs::read_to_string(root.file("/etc/group"))?.contains("\nqjump:"));
    Ok(())
}

/// The three of the unit: with them, loading, replacing, looking, tagging a cgroup and unloading work.
#[test]
fn three_capabilities_are_enough() -> Result<()> {
    let installed = Installed::new()?;
    let before = installed.link.tc_state()?;
    let bare = |arguments: &[&str]| {
        let few = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon", "qjump"];
        installed.run(&[&few, arguments].concat())
    };
    let load = |queue| [&["load", "--interface", &installed.link.device, "--queue", queue], &PLAN[..]].concat();
    for queue in ["keep", "auto", "htb"] {
        bare(&load(queue))?;
        let status: Value = serde_json::from_str(&bare(&["status", "--interface", &installed.link.device, "--json"])?)?;
        assert_eq!(status["interfaces"][0]["attached"], true, "{queue}");
        // What it takes without trying is what it takes after trying.
        let chosen = installed.status()?["queue"].clone();
        installed.load(&["--queue", queue])?;
        assert_eq!(installed.status()?["queue"], chosen, "{queue}");
    }
    bare(&["unload", "--interface", &installed.link.device])?;
    assert_eq!(installed.link.tc_state()?, before);
    Ok(())
}

#[test]
fn the_unit_is_valid_and_hardened() -> Result<()> {
    let installed = Installed::new()?;
    let unit = "/usr/lib/systemd/system/qjump.service";
    let output = installed.output(&["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit])?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("qjump.service"), "{said}");
    // Of 10.0, which is no protection at all; in tenths.
    let security = ["systemd-analyze", "security", "--offline=true", "--threshold=40", "--no-pager", unit];
    let said = installed.run(&security)?;
    for capability in ["SYS_ADMIN", "SYS_PTRACE", "NET_RAW", "DAC_OVERRIDE"] {
        let granted = said
            .lines()
            .any(|line| line.contains("CapabilityBoundingSet") && line.contains(capability) && line.starts_with('✗'));
        assert!(!granted, "{capability}: {said}");
    }
    let text = fs::read_to_string(installed.root.file(unit))?;
    for line in [
        "Type=notify",
        "WatchdogSec=30s",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "CapabilityBoundingSet=CAP_BPF CAP_NET_ADMIN CAP_PERFMON",
        "NoNewPrivileges=yes",
    ] {
        assert!(text.lines().any(|other| other == line), "{line}");
    }
    Ok(())
}

#[test]
fn completions_and_pages_know_every_command() -> Result<()> {
    let installed = Installed::new()?;
    let help = installed.run(&["qjump", "--help"])?;
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() > 15, "{commands:?}");
    for command in &commands {
        let page = format!("/usr/share/man/man1/qjump-{command}.1.gz");
        assert!(installed.root.file(&page).is_file(), "{page}");
    }
    let pages = fs::read_dir(installed.root.file("/usr/share/man/man1"))?;
    let ours =
        pages.filter_map(|page| page.ok()?.file_name().into_string().ok()).filter(|name| name.starts_with("qjump"));
    for page in ours {
        let file = format!("/usr/share/man/man1/{page}");
        let output = installed.output(&["man", "--warnings", "--local-file", &file])?;
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{page}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // What bash offers after the name of the command and a few letters.
    let script = format!(
        "source {}\nCOMP_WORDS=(qjump swi)\nCOMP_CWORD=1\n_qjump qjump swi qjump\necho \"${{COMPREPLY[@]}}\"",
        installed.root.file("/usr/share/bash-completion/completions/qjump").display()
    );
    assert_eq!(run("bash", &["-c", &script])?.trim(), "switch-config");
    Ok(())
}

/// Reads a schema and a TOML file; exit status 1 if the file is not valid.
const VALIDATE: &str = "
import json, sys, tomllib
from jsonschema import Draft202012Validator
schema = json.load(open(sys.argv[1]))
Draft202012Validator.check_schema(schema)
errors = list(Draft202012Validator(schema).iter_errors(tomllib.load(open(sys.argv[2], 'rb'))))
for error in errors:
    print(error.json_path, error.message)
sys.exit(bool(errors))
";

#[test]
fn the_schema_takes_what_qjump_takes() -> Result<()> {
    let folder = Scratch::new("schema")?;
    let schema = folder.0.join("schema.json");
    fs::write(&schema, run(binary().to_str().context("a path")?, &["schema"])?)?;
    let schema = schema.to_str().context("a path")?;
    let validate =
        |file: &str| Command::new("/usr/bin/python3").args(["-W", "ignore", "-c", VALIDATE, schema, file]).output();
    let plan = |file: &str| Command::new(binary()).args(["plan", "--config", file]).output();
    let examples = ["qjump.toml", "apps.toml"].map(|name| format!("{}/../scripts/{name}", env!("CARGO_MANIFEST_DIR")));
    for example in &examples {
        succeeded(&validate(example)?).with_context(|| example.clone())?;
        succeeded(&plan(example)?)?;
    }
    let good = "[cluster]\nhosts = 12\nlink-rate = \"10gbit\"\nmax-packet = 256\nhops = 3\nswitch-delay = \"500ns\"\n\
                [[level]]\nlevel = 7\nfactor = 1\n[[level]]\nlevel = 5\nrate = \"100mbit\"\nburst = 30000\nover = \"pace\"\n\
                [[assign]]\nlevel = 5\nlocal-port = \"8000-8010\"\nremote = \"10.0.0.0/8\"\nuser = \"root\"\n\
                [host]\ninterfaces = [\"eth0\"]\nqueue = \"htb\"\n";
    let file = folder.0.join("try.toml");
    let try_it = |text: &str| -> Result<(bool, bool)> {
        fs::write(&file, text)?;
        let path = file.to_str().context("a path")?;
        Ok((validate(path)?.status.success(), plan(path)?.status.success()))
    };
    assert_eq!(try_it(good)?, (true, true));
    // One thing wrong in turn: neither takes it.
    for (right, wrong) in [
        ("hosts = 12", "hosts = \"12\""),
        ("hosts = 12", "hosts = 0"),
        ("hosts = 12", "host = 12"),
        ("\"10gbit\"", "\"10\""),
        ("\"10gbit\"", "10"),
        ("\"500ns\"", "\"500\""),
        ("hops = 3\n", ""),
        ("hops = 3", "epsilon = \"1us\"\nhops = 3"),
        ("level = 7", "level = 8"),
        ("factor = 1", "factor = 0"),
        ("factor = 1", "factor = \"all\""),
        ("factor = 1", "factor = 1\nrate = \"1mbit\""),
        ("factor = 1", "factr = 1"),
        ("\"pace\"", "\"wait\""),
        ("\"htb\"", "\"cake\""),
        ("[\"eth0\"]", "\"eth0\""),
        ("[host]", "[hosts]"),
    ] {
        assert!(good.contains(right), "{right}");
        assert_eq!(try_it(&good.replacen(right, wrong, 1))?, (false, false), "{wrong}");
    }
    Ok(())
}

#[test]
fn mistakes_of_what_writes_files_are_told() -> Result<()> {
    for (arguments, status, part) in [
        (&["completions", "tcsh"][..], 64, "invalid value 'tcsh'"),
        (&["man", "/nowhere"], 1, "cannot write /nowhere/qjump.1"),
    ] {
        let (code, message) = failed(&Command::new(binary()).args(arguments).output()?);
        assert!(code == status && message.contains(part), "{message}");
    }
    Ok(())
}

/// What a YAML file says, document after document.
fn yaml(file: &str) -> Result<Vec<Value>> {
    let script = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let path = format!("{}/../scripts/{file}", env!("CARGO_MANIFEST_DIR"));
    Ok(serde_json::from_str(&run("/usr/bin/python3", &["-c", script, &path])?)?)
}

#[test]
fn the_daemonset_has_what_the_agent_needs_and_no_more() -> Result<()> {
    let documents = yaml("kubernetes/daemonset.yaml")?;
    let kind = |kind: &str| {
        let mut found = documents.iter().filter(|document| document["kind"] == kind);
        found.next().filter(|_| found.next().is_none()).with_context(|| format!("one {kind}"))
    };
    let (namespace, configuration, daemons) = (kind("Namespace")?, kind("ConfigMap")?, kind("DaemonSet")?);
    assert_eq!(daemons["apiVersion"], "apps/v1");
    for document in [configuration, daemons] {
        assert_eq!(document["metadata"]["namespace"], namespace["metadata"]["name"]);
    }
    let template = &daemons["spec"]["template"];
    assert_eq!(daemons["spec"]["selector"]["matchLabels"], template["metadata"]["labels"]);
    let pod = &template["spec"];
    assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&true.into(), &true.into()));
    assert_eq!(pod["automountServiceAccountToken"], false);
    let containers = pod["containers"].as_array().context("containers")?;
    ensure!(containers.len() == 1, "{} containers", containers.len());
    let security = &containers[0]["securityContext"];
    assert_eq!((&security["privileged"], &security["allowPrivilegeEscalation"]), (&false.into(), &false.into()));
    assert_eq!(security["capabilities"]["drop"], serde_json::json!(["ALL"]));
    // Those of the unit.
    let unit = fs::read_to_string(format!("{}/../scripts/systemd/qjump.service", env!("CARGO_MANIFEST_DIR")))?;
    let of_unit = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).context("capabilities")?;
    let added = security["capabilities"]["add"].as_array().context("capabilities")?;
    let added: Vec<String> = added.iter().filter_map(Value::as_str).map(|name| format!("CAP_{name}")).collect();
    assert_eq!(added.join(" "), of_unit);
    // Each mount has its volume, and what must outlive the pod is the node's.
    let volumes = pod["volumes"].as_array().context("volumes")?;
    for mount in containers[0]["volumeMounts"].as_array().context("mounts")? {
        let volume =
            volumes.iter().find(|volume| volume["name"] == mount["name"]).with_context(|| mount.to_string())?;
        match mount["mountPath"].as_str() {
            Some("/etc/qjump") => assert_eq!(volume["configMap"]["name"], configuration["metadata"]["name"]),
            path => assert_eq!(volume["hostPath"]["path"].as_str(), path),
        }
    }
    // The example is a configuration.
    let folder = Scratch::new("kubernetes")?;
    let file = folder.0.join("qjump.toml");
    fs::write(&file, configuration["data"]["qjump.toml"].as_str().context("a configuration")?)?;
    succeeded(&Command::new(binary()).args(["plan", "--config"]).arg(&file).output()?)?;
    Ok(())
}

#[test]
fn the_container_is_made_of_the_package() -> Result<()> {
    let text = fs::read_to_string(format!("{}/../scripts/container/Containerfile", env!("CARGO_MANIFEST_DIR")))?;
    let instruction = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    assert_eq!(instruction("FROM "), Some("debian:bookworm-slim"));
    let (pattern, _) = instruction("COPY ").and_then(|rest| rest.split_once(' ')).context("COPY")?;
    let (start, end) = pattern.split_once('*').context("a pattern")?;
    let package = package()?;
    let name = package.file_name().and_then(|name| name.to_str()).context("a name")?;
    assert!(name.starts_with(start) && name.ends_with(end), "{name} is not {pattern}");
    assert_eq!(instruction("ENTRYPOINT "), Some("[\"/usr/bin/qjump\"]"));
    // Debian bookworm has glibc 2.36.
    let depends = run("dpkg-deb", &["-f", package.to_str().context("a path")?, "Depends"])?;
    let wanted = depends.split("libc6 (>= 2.").nth(1).and_then(|rest| rest.split(')').next()?.parse::<u32>().ok());
    assert!(wanted.is_some_and(|minor| minor <= 36), "{depends}");
    Ok(())
}
