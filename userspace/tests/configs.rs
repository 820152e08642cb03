//! Configurations that are wrong in one place each: what is said, and where.

use qjump::{agent::desired::Desired, config::File};

const GOOD: &str = r#"[cluster]
hosts = 12
link-rate = "10gbit"
max-packet = 256
hops = 3
switch-delay = "500ns"
mtu = 1514
host-burst = 1538
model = "strict"
wire-overhead = 24

[[level]]
level = 7
factor = 1
charge = "packet"
tolerance = "1us"

[[level]]
level = 5
rate = "50mbit"
max-packet = 1514
burst = 30000
oversize = "drop"
over = "pace"
claims = "grant-only"

[[assign]]
level = 5
unit = "memcached.service"
local-port = 11211

[[assign]]
level = 0
remote = "10.0.0.0/8"
remote-port = "8000-8010"
exe = "/usr/bin/x"
user = 1000

[[assign]]
level = 5
cgroup = "/system.slice/x"

[host]
interfaces = ["eth0"]
pcp = false
queue = "auto"
rate = "1gbit"
"#;

/// What a configuration wants, or what is said against it.
fn read(text: &str) -> Result<Desired, String> {
    Desired::of(File::parse(text)?, None)
}

/// From, to, the line that is named, and a part of what is said.
const WRONG: [(&str, &str, usize, &str); 66] = [
    ("[cluster]", "[clusters]", 1, "did you mean 'cluster'?"),
    ("[cluster]", "[cluster", 1, "^"),
    ("hosts = 12", "host = 12", 2, "did you mean 'hosts'?"),
    ("hosts = 12", "hosts = 1.5", 2, "expected the number of hosts"),
    ("hosts = 12", "hosts = \"12\"", 2, "expected the number of hosts"),
    ("hosts = 12", "hosts = ", 2, "^"),
    ("hosts = 12", "hosts = 12\nhosts = 13", 3, "duplicate key"),
    ("hosts = 12\n", "", 1, "give hosts = N"),
    ("link-rate = \"10gbit\"\n", "", 1, "missing field `link-rate`"),
    ("\"10gbit\"", "\"0gbit\"", 3, "above 0"),
    ("\"10gbit\"", "\"-1gbit\"", 3, "not below 0"),
    ("\"10gbit\"", "\"10\"", 3, "unit"),
    ("\"10gbit\"", "true", 3, "rate with its unit"),
    ("max-packet = 256", "max-packet = -1", 4, "plain number of bytes"),
    ("max-packet = 256", "max-packet = 99999", 1, "max-packet"),
    ("max-packet = 256\n", "", 1, "missing field `max-packet`"),
    ("hops = 3", "hops = 0", 1, "hops is 0"),
    ("hops = 3", "hops = \"3\"", 5, "invalid type"),
    ("hops = 3\n", "", 1, "either as epsilon, or as hops"),
    ("hops = 3", "hops = 3\nepsilon = \"4us\"", 1, "either as epsilon, or as hops"),
    ("\"500ns\"", "\"500\"", 6, "unit"),
    ("\"500ns\"", "\"-5ns\"", 6, "^"),
    ("switch-delay = \"500ns\"\n", "", 1, "either as epsilon, or as hops"),
    ("mtu = 1514", "mtu = \"big\"", 7, "plain number of bytes"),
    ("host-burst = 1538", "host-burst = 1.5", 8, "plain number of bytes"),
    ("\"strict\"", "\"strickt\"", 9, "unknown variant"),
    ("wire-overhead = 24", "wire-overhead = -24", 10, "plain number of bytes"),
    ("level = 7", "level = -1", 13, "no level -1"),
    ("level = 7", "level = 7.5", 13, "a number from 0 to 7"),
    ("level = 7\n", "", 12, "missing field `level`"),
    ("factor = 1", "factor = -1", 14, "above 0"),
    ("factor = 1", "factor = inf", 14, "above 0"),
    ("factor = 1", "factor = \"fast\"", 14, "neither a number"),
    ("factor = 1", "factor = 1\nrate = \"1mbit\"", 12, "either factor or rate"),
    ("factor = 1\n", "", 12, "either factor or rate"),
    ("charge = \"packet\"", "charge = \"packets\"", 15, "unknown variant"),
    ("\"1us\"", "\"1\"", 16, "unit"),
    ("\"1us\"", "1", 16, "time with its unit"),
    ("level = 5\nrate = \"50mbit\"", "level = 7\nrate = \"50mbit\"", 18, "this is the other one"),
    ("\"50mbit\"", "\"50mbps\"", 20, "^"),
    ("\"50mbit\"", "\"50gbit\"", 18, "level 5"),
    ("max-packet = 1514", "max-packt = 1514", 21, "did you mean 'max-packet'?"),
    ("burst = 30000", "burst = \"30k\"", 22, "plain number of bytes"),
    ("burst = 30000", "burst = 10", 18, "burst"),
    ("\"drop\"", "\"dropp\"", 23, "unknown variant"),
    ("over = \"pace\"", "over = \"wait\"", 24, "unknown variant"),
    ("\"grant-only\"", "true", 25, "^"),
    ("[[assign]]\nlevel = 5\nunit", "[[asign]]\nlevel = 5\nunit", 27, "did you mean 'assign'?"),
    ("level = 5\nunit", "unit", 27, "missing field `level`"),
    ("unit = \"memcached.service\"", "unit = \"memcached.timer\"", 29, "not a unit that has processes"),
    ("unit = \"memcached.service\"", "unit = \"\"", 29, "not a unit that has processes"),
    ("unit = \"memcached.service\"", "cgroup = \"/a\"\nunit = \"b\"", 27, "not both"),
    ("local-port = 11211", "local-port = 0", 30, "neither a port"),
    ("local-port = 11211", "local-port = 70000", 30, "neither a port"),
    ("local-port = 11211", "local_prot = 1", 30, "did you mean"),
    ("\"10.0.0.0/8\"", "\"10.0.0.1/8\"", 34, "did you mean 10.0.0.0/8?"),
    ("\"10.0.0.0/8\"", "\"10.0.0.0/33\"", 34, "at most 32 bits"),
    ("\"8000-8010\"", "\"8010-8000\"", 35, "neither a port"),
    ("\"/usr/bin/x\"", "\"x\"", 36, "full path"),
    ("user = 1000", "user = \"no such user\"", 32, "there is no user"),
    ("user = 1000", "user = true", 37, "user's name"),
    ("\"/system.slice/x\"", "\"/\"", 41, "all processes"),
    ("\"/system.slice/x\"", "\"x/y\"", 41, "not the path of a cgroup"),
    ("[\"eth0\"]", "[1]", 44, "^"),
    ("pcp = false", "pcp = \"no\"", 45, "invalid type"),
    ("\"auto\"", "\"fast\"", 46, "unknown variant"),
];

#[test]
fn each_wrong_place_is_shown() {
    read(GOOD).expect("the good one is good");
    let mut missed = Vec::new();
    for (from, to, line, part) in WRONG {
        assert!(GOOD.contains(from), "{from}");
        match read(&GOOD.replacen(from, to, 1)) {
            Ok(_) => missed.push(format!("{to:?} is accepted")),
            Err(error)
                if !error.contains(&format!("line {line},")) || !error.contains(part) || !error.contains('^') =>
            {
                missed.push(format!("{to:?}, line {line}, {part:?}:\n{error}"));
            }
            Err(_) => {}
        }
    }
    assert!(missed.is_empty(), "{} of {}:\n{}", missed.len(), WRONG.len(), missed.join("\n\n"));
}

#[test]
fn what_is_wrong_together_names_both() {
    let with = |fragment: &str| {
        let mut file = File::parse(GOOD).expect("it is good");
        file.add("conf.d/a.toml", fragment)?;
        Desired::of(file, None)
    };
    let both = with(
        "[[level]]\nlevel = 4\nfactor = 2\n\n[[assign]]\nlevel = 4\nlocal-port = 1\n\n[host]\ninterfaces = [\"eth1\"]\n",
    );
    let both = both.expect("it is good together");
    assert_eq!(both.file.host.interfaces, ["eth0", "eth1"]);
    assert_eq!((both.plan.levels.len(), both.rules.iter().len()), (3, 4));
    for (fragment, part, other) in [
        ("\n[[level]]\nlevel = 7\nfactor = 2\n", "in conf.d/a.toml at line 2,", "at line 12,"),
        (
            "# first\n\n[[assign]]\nlevel = 6\ncgroup = \"/system.slice/x\"\n",
            "in conf.d/a.toml at line 3,",
            "at line 39,",
        ),
        ("[host]\ninterfaces = [\"eth0\"]\n", "in conf.d/a.toml at line 1,", "named already"),
        (
            "[[app]]\nname = \"a\"\nmessage = 64\nper-second = 1\ndeadline = \"1ms\"\n",
            "in conf.d/a.toml at line 1,",
            "levels as well",
        ),
        ("[cluster]\nhosts = 1\n", "in conf.d/a.toml: ", "unknown field `cluster`"),
        ("[host]\ninterfaces = [\"eth1\"]\npcp = true\n", "line 3,", "unknown field `pcp`"),
    ] {
        let error = with(fragment).expect_err(fragment);
        assert!(error.contains(part) && error.contains(other) && error.contains('^'), "{fragment}: {error}");
    }
}

#[test]
fn a_difference_is_said_line_by_line() {
    let before = read(GOOD).expect("it is good");
    assert_eq!(before.difference(&read(GOOD).expect("it is good")), [""; 0]);
    for (from, to, expected) in [
        ("hosts = 12", "hosts = 13", "hosts: 12 -> 13"),
        ("rate = \"50mbit\"", "rate = \"40mbit\"", "  level 5: 50mbit -> 40mbit"),
        ("[\"eth0\"]", "[\"eth1\"]", "- interface eth0"),
        ("[\"eth0\"]", "[\"eth0\", \"eth1\"]", "+ interface eth1"),
        (
            "local-port = 11211",
            "local-port = 11212",
            "+ rule level 5 for unit memcached.service local-port 11212-11212",
        ),
        ("burst = 30000", "burst = 40000", "  level 5: the same rate, other details"),
        ("level = 5\nrate", "level = 4\nrate", "+ level 4: 50mbit"),
        ("\"auto\"", "\"htb\"", "queue: Auto -> Htb"),
    ] {
        let after = read(&GOOD.replacen(from, to, 1)).expect(to);
        let lines = before.difference(&after);
        assert!(lines.iter().any(|line| line == expected), "{to}: {lines:?}");
    }
}
