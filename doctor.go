package spirt

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/pbnjay/memory"

	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensordb"
)

// Finding is what one check of a host found.
type Finding struct {
	Check string `json:"check"`
	State string `json:"state"`          // ok, warning or problem
	Found string `json:"found"`          // what is there
	Mend  string `json:"mend,omitempty"` // what to do, unless it is ok
}

// The states of a Finding.
const (
	FindingOK      = "ok"
	FindingWarning = "warning"
	FindingProblem = "problem"
)

// DoctorConfig says what to look at.
type DoctorConfig struct {
	Dir        string // where runs are to lie. Default: the current folder
	Database   string // URL of a database in another process; empty: none
	Peer       string // host:port of another peer; empty: none
	Executable string // runs this program as a function instance. Default: this process's own
}

// host is what the checks go by, so that tests can say what there is.
type host struct {
	avx2     bool
	arch     string
	cores    int
	quota    float64 // cores by the control group; 0: no limit
	memory   uint64  // bytes, by the control group where that is less
	free     uint64  // bytes of disk; 0: not known
	files    uint64  // that may be open; 0: not known
	clock    string  // what is wrong with the clock; empty: nothing
	isolates string
}

// What a default job takes at least.
const (
	memoryPerPeer = 80 << 20 // a peer with its two instances
	diskPerPeer   = 20 << 20
	filesPerPeer  = 256
)

// findings judges what the host has.
func (h host) findings(peers int) []Finding {
	out := []Finding{{Check: "processor", State: FindingOK, Found: "AVX2 kernels are used"}}
	if !h.avx2 {
		out[0] = Finding{"processor", FindingWarning, h.arch + " without AVX2: plain Go computes the gradients", "training is several times slower than with AVX2 and ends with the same model; take a smaller model or batch"}
	}
	cores := Finding{Check: "cores", State: FindingOK, Found: fmt.Sprintf("%d", h.cores)}
	if h.quota > 0 && h.quota < float64(h.cores) {
		cores = Finding{"cores", FindingWarning, fmt.Sprintf("%d, but a control group allows the time of %.2f", h.cores, h.quota), "peers and functions share that time, and rounds take longer: raise the limit, or start fewer peers (--peers)"}
	}
	out = append(out, cores)
	need := uint64(peers) * memoryPerPeer
	mem := Finding{Check: "memory", State: FindingOK, Found: fmt.Sprintf("%d MB", h.memory>>20)}
	switch {
	case h.memory == 0:
		mem.Found = "the system does not tell"
	case h.memory < need:
		mem.State, mem.Mend = FindingProblem, fmt.Sprintf("%d peers of the default job take about %d MB: start fewer (--peers), or find more memory", peers, need>>20)
	case h.memory < 2*need:
		mem.State, mem.Mend = FindingWarning, fmt.Sprintf("%d peers of the default job take about %d MB: that is most of it", peers, need>>20)
	}
	out = append(out, mem)
	disk := Finding{Check: "disk", State: FindingOK, Found: fmt.Sprintf("%d MB free", h.free>>20)}
	switch need := uint64(peers) * diskPerPeer; {
	case h.free == 0:
		disk.Found = "the system does not tell"
	case h.free < need:
		disk.State, disk.Mend = FindingProblem, fmt.Sprintf("a run of the default job takes about %d MB: free some, or take another folder (--run)", need>>20)
	case h.free < 1<<30:
		disk.State, disk.Mend = FindingWarning, "large models take several times their size for each peer: keep an eye on it"
	}
	out = append(out, disk)
	files := Finding{Check: "open files", State: FindingOK, Found: fmt.Sprintf("%d a process", h.files)}
	switch {
	case h.files == 0:
		files.Found = "the system does not tell"
	case h.files < filesPerPeer:
		files.State, files.Mend = FindingProblem, "raise the limit: ulimit -n 4096"
	case h.files < 4*filesPerPeer:
		files.State, files.Mend = FindingWarning, "enough for small rosters; for more than 32 peers: ulimit -n 4096"
	}
	out = append(out, files)
	clock := Finding{Check: "clock", State: FindingOK, Found: time.Now().UTC().Format(time.RFC3339)}
	if h.clock != "" {
		clock = Finding{"clock", FindingWarning, h.clock, "rounds do not depend on it, but invites end by it and logs of several machines do not fit together: have it set by NTP"}
	}
	out = append(out, clock)
	isolation := Finding{Check: "isolation", State: FindingOK, Found: "functions run under " + h.isolates}
	if h.isolates == "" {
		isolation = Finding{"isolation", FindingWarning, "nothing keeps functions from what their user may do", "train only models that you trust, or on Linux 5.13 or later, or as root (docs/security.md)"}
	}
	return append(out, isolation)
}

// Doctor checks whether this host can train, and tells of each check as it is
// done.
func Doctor(ctx context.Context, cfg DoctorConfig, tell func(Finding)) {
	orString(&cfg.Dir, ".")
	if cfg.Executable == "" {
		cfg.Executable = function.Self()
	}
	h := host{avx2: kernel.HasAVX2(), arch: runtime.GOARCH, cores: runtime.NumCPU(), memory: memory.TotalMemory(), isolates: function.Isolates()}
	h.measure(cfg.Dir)
	for _, f := range h.findings(DefaultJob().Peers) {
		tell(f)
	}
	p := thisHost()
	tell(p.checkFolder(cfg.Dir))
	tell(p.checkSocket(cfg.Dir))
	tell(p.checkLoopback())
	tell(p.checkPeers(ctx))
	if cfg.Peer != "" {
		tell(checkPeer(ctx, cfg.Peer))
	}
	if cfg.Database != "" {
		tell(checkDatabase(ctx, cfg.Database))
	}
	tell(checkTraining(ctx, cfg))
}

func problem(check, found, mend string) Finding { return Finding{check, FindingProblem, found, mend} }

// probes are what the checks do to the host, so that tests can have it fail.
type probes struct {
	write  func(dir string) error // and remove a file, through to the disk
	listen func(network, address string) (net.Listener, error)
	dial   func(network, address string, timeout time.Duration) (net.Conn, error)
	host   func(p2p.Config) (*p2p.Host, error)
}

func thisHost() probes {
	return probes{write: tryWrite, listen: net.Listen, dial: net.DialTimeout, host: p2p.New}
}

func tryWrite(dir string) error {
	f, err := os.CreateTemp(dir, ".spirt-doctor-")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, 1<<20))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

// checkFolder writes to the folder in which runs are to lie.
func (p probes) checkFolder(dir string) Finding {
	if err := p.write(dir); err != nil {
		return problem("folder", err.Error(), "runs cannot be written there: make the folder, let this user in (chmod u+rwx), free some space, or take another (--dir)")
	}
	return Finding{Check: "folder", State: FindingOK, Found: dir + " can be written to"}
}

// checkSocket connects to a Unix socket where a peer's database would listen
// (see peer.socketPath).
func (p probes) checkSocket(dir string) Finding {
	fault := func(err error) Finding {
		return problem("socket", err.Error(), "functions reach their peer's database by a Unix socket: take a folder on a local file system (--dir), with TMPDIR a short one, or a database in another process (--db)")
	}
	at, err := filepath.Abs(dir)
	if err != nil {
		return fault(err)
	}
	root := os.Geteuid() == 0
	if root {
		at = "/run"
	} else if len(filepath.Join(peerDir(filepath.Join(at, "runs", "20060102-150405-logistic"), 99), socketFile)) > tensordb.MaxSocketPath {
		at = "" // the system's for temporary files
	}
	made, err := os.MkdirTemp(at, ".spirt-doctor-")
	if err != nil && root {
		made, err = os.MkdirTemp("", ".spirt-doctor-")
	}
	if err != nil {
		return fault(err)
	}
	defer os.RemoveAll(made)
	path := filepath.Join(made, "s")
	l, err := p.listen("unix", path)
	if err != nil {
		return fault(err)
	}
	defer l.Close()
	c, err := p.dial("unix", path, 5*time.Second)
	if err != nil {
		return fault(err)
	}
	c.Close()
	return Finding{Check: "socket", State: FindingOK, Found: "Unix sockets work in " + filepath.Dir(made)}
}

// checkLoopback has two sockets of this host meet.
func (p probes) checkLoopback() Finding {
	l, err := p.listen("tcp", "127.0.0.1:0")
	if err != nil {
		return problem("network", err.Error(), "peers of one machine meet at 127.0.0.1: allow it to listen there")
	}
	defer l.Close()
	c, err := p.dial("tcp", l.Addr().String(), 5*time.Second)
	if err != nil {
		return problem("network", err.Error(), "something keeps programs from connecting to 127.0.0.1: look at the firewall")
	}
	c.Close()
	return Finding{Check: "network", State: FindingOK, Found: "loopback answers"}
}

// checkPeers has two peers meet that know each other's key.
func (p probes) checkPeers(ctx context.Context) Finding {
	fault := func(err error) Finding {
		return problem("peers", err.Error(), "peers of one machine meet at 127.0.0.1 over TCP, encrypted: look at the firewall, and at the limits of processes and files")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	start := time.Now()
	var cfg [2]p2p.Config
	var members []p2p.Member
	for i := range cfg {
		key, err := p2p.NewKey()
		if err != nil {
			return fault(err)
		}
		cfg[i].Key = key
		members = append(members, p2p.Member{Index: i, Key: key.Public().(ed25519.PublicKey)})
	}
	var hosts [2]*p2p.Host
	for i := range hosts {
		cfg[i].Members, cfg[i].Listen = members, []string{"127.0.0.1:0"}
		cfg[i].Check = func([]byte) (p2p.Meta, error) { return p2p.Meta{}, errors.New("peers that only meet say nothing") }
		h, err := p.host(cfg[i])
		if err != nil {
			return fault(err)
		}
		defer h.Close()
		hosts[i] = h
	}
	if err := hosts[1].SetAddresses(0, hosts[0].Addrs()); err != nil {
		return fault(err)
	}
	for {
		select {
		case e := <-hosts[1].Events():
			switch e := e.(type) {
			case p2p.Connected:
				return Finding{Check: "peers", State: FindingOK, Found: fmt.Sprintf("two peers met in %v", time.Since(start).Round(time.Millisecond))}
			case p2p.Refused:
				return fault(fmt.Errorf("two peers did not meet: %s", e.Reason))
			}
		case <-ctx.Done():
			return fault(fmt.Errorf("two peers did not meet: %w", ctx.Err()))
		}
	}
}

// checkPeer looks whether another peer's address answers.
func checkPeer(ctx context.Context, address string) Finding {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	start := time.Now()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return problem("peer", err.Error(), "is it running, is that its address and port, and does its firewall or router let it through?")
	}
	c.Close()
	return Finding{Check: "peer", State: FindingOK, Found: fmt.Sprintf("%s answers in %v", address, time.Since(start).Round(10*time.Microsecond))}
}

// checkDatabase looks at a database in another process.
func checkDatabase(ctx context.Context, url string) Finding {
	address, err := tensordb.ParseAddress(url)
	if err != nil {
		return problem("database", err.Error(), "give a URL such as redis://127.0.0.1:6379")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client, err := tensordb.Connect(ctx, address, tensordb.ClientConfig{Timeout: 10 * time.Second})
	if err != nil {
		return problem("database", err.Error(), "is it running, and are user and password right?")
	}
	defer client.Close()
	var times []time.Duration
	for range 20 {
		start := time.Now()
		if err := client.Do(nil, "PING"); err != nil {
			return problem("database", err.Error(), "it answers no PING")
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	took := times[len(times)/2].Round(time.Microsecond)
	if has, err := client.Knows("TENSOR.SET"); err != nil || !has {
		return Finding{"database", FindingWarning, fmt.Sprintf("%v answers in %v, without tensor commands", address, took), "tensors will be fetched, computed and stored again, which is slower: load the module spirt.so (docs/redis.md)"}
	}
	return Finding{Check: "database", State: FindingOK, Found: fmt.Sprintf("%v has tensor commands and answers in %v", address, took)}
}

// checkTraining trains one peer for two rounds, with its database, its
// functions and its checkpoints in a folder that is removed again.
func checkTraining(ctx context.Context, cfg DoctorConfig) Finding {
	dir, err := os.MkdirTemp(cfg.Dir, ".spirt-doctor-")
	if err != nil {
		return problem("training", err.Error(), "runs cannot be written there: take another folder (--dir)")
	}
	defer os.RemoveAll(dir)
	run := filepath.Join(dir, "run")
	job := Job{Peers: 1, Model: "lenet5", Rounds: 2, ValidateEvery: 1, CheckpointEvery: 1}
	if err := job.Resolve(); err != nil {
		return problem("training", err.Error(), "this is a fault of this program: report it")
	}
	start := time.Now()
	if err = createRun(run, job); err == nil {
		err = RunPeer(ctx, PeerConfig{Run: run, Peer: 1, Executable: cfg.Executable})
	}
	if err != nil {
		return problem("training", err.Error(), "one peer cannot train two rounds here; the error says why")
	}
	took := time.Since(start)
	var cold, warm float64
	if tail, err := EventsOf(run); err == nil {
		tail.Each(func(e *Event) {
			if i := e.Invocation; i != nil && i.Task == "gradient" {
				if warm = i.MS; i.Cold {
					cold = max(cold, i.InitMS)
				}
			}
		})
		tail.Close()
	}
	return Finding{Check: "training", State: FindingOK, Found: fmt.Sprintf("two rounds of LeNet-5 in %v; an instance starts in %.0f ms, a gradient of %d samples takes %.1f ms", took.Round(time.Millisecond), cold, job.BatchSize, warm)}
}

// cgroupValue reads a number of a control group's file (version 2): the first
// field; ok is false for "max" and where there is none.
func cgroupValue(root fs.FS, name string) (first, second float64, ok bool) {
	b, err := fs.ReadFile(root, name)
	if err != nil {
		return 0, 0, false
	}
	n, err := fmt.Fscan(bytes.NewReader(b), &first, &second)
	return first, second, n >= 1 && (err == nil || n == 1)
}
