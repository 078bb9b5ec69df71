package spirt

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/p2p"
)

func TestFindings(t *testing.T) {
	good := host{avx2: true, arch: "amd64", cores: 4, memory: 8 << 30, free: 100 << 30, files: 1 << 16, isolates: "Landlock"}
	for _, f := range good.findings(4) {
		if f.State != FindingOK || f.Found == "" || f.Mend != "" {
			t.Errorf("%+v", f)
		}
	}
	for name, c := range map[string]struct {
		change func(h *host)
		check  string
		state  string
		says   string
	}{
		"no AVX2":       {func(h *host) { h.avx2 = false }, "processor", FindingWarning, "slower"},
		"quota":         {func(h *host) { h.quota = .5 }, "cores", FindingWarning, "0.50"},
		"little memory": {func(h *host) { h.memory = 100 << 20 }, "memory", FindingProblem, "--peers"},
		"some memory":   {func(h *host) { h.memory = 500 << 20 }, "memory", FindingWarning, "most of it"},
		"full disk":     {func(h *host) { h.free = 1 }, "disk", FindingProblem, "--run"},
		"some disk":     {func(h *host) { h.free = 500 << 20 }, "disk", FindingWarning, "eye"},
		"few files":     {func(h *host) { h.files = 64 }, "open files", FindingProblem, "ulimit"},
		"some files":    {func(h *host) { h.files = 512 }, "open files", FindingWarning, "ulimit"},
		"clock":         {func(h *host) { h.clock = "it is not set" }, "clock", FindingWarning, "NTP"},
		"no isolation":  {func(h *host) { h.isolates = "" }, "isolation", FindingWarning, "docs/security.md"},
	} {
		h := good
		c.change(&h)
		for _, f := range h.findings(4) {
			if want := f.Check == c.check; want && (f.State != c.state || !strings.Contains(f.Found+f.Mend, c.says)) || !want && f.State != FindingOK {
				t.Errorf("%s: %+v", name, f)
			}
		}
	}
	unknown := good
	unknown.memory, unknown.free, unknown.files = 0, 0, 0
	for _, f := range unknown.findings(4) {
		if f.State != FindingOK {
			t.Errorf("what is not known is no fault: %+v", f)
		}
	}
}

func TestDoctor(t *testing.T) {
	dir := t.TempDir()
	_, url := serveDatabase(t)
	found := map[string]Finding{}
	Doctor(t.Context(), DoctorConfig{Dir: dir, Executable: os.Args[0], Database: url, Peer: "127.0.0.1:1"}, func(f Finding) { found[f.Check] = f })
	for _, check := range []string{"folder", "socket", "network", "peers", "database", "training"} {
		if f := found[check]; f.State != FindingOK || f.Found == "" {
			t.Errorf("%s: %+v", check, f)
		}
	}
	if f := found["peer"]; f.State != FindingProblem || f.Mend == "" {
		t.Errorf("%+v", f)
	}
	if strings.Contains(found["database"].Found, "token") {
		t.Error("the finding tells the token")
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v", left)
	}
	for _, f := range []Finding{checkDatabase(t.Context(), "http://x"), checkDatabase(t.Context(), "redis://127.0.0.1:1"), checkTraining(t.Context(), DoctorConfig{Dir: filepath.Join(dir, "none")})} {
		if f.State != FindingProblem || f.Mend == "" {
			t.Errorf("%+v", f)
		}
	}
}

// What a host refuses is a problem, with the reason and a way to mend it; what
// was made for the check is gone afterwards.
func TestProbes(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	denied := errors.New("permission denied")
	noListen := func(string, string) (net.Listener, error) { return nil, denied }
	noDial := func(string, string, time.Duration) (net.Conn, error) { return nil, denied }
	folder := func(p probes) Finding { return p.checkFolder(dir) }
	socket := func(p probes) Finding { return p.checkSocket(dir) }
	peers := func(p probes) Finding { return p.checkPeers(t.Context()) }
	hosts := 0
	for name, c := range map[string]struct {
		change func(*probes)
		check  func(probes) Finding
		mend   string
	}{
		"nothing is written": {func(p *probes) { p.write = func(string) error { return denied } }, folder, "chmod"},
		"no Unix socket":     {func(p *probes) { p.listen = noListen }, socket, "--db"},
		"no way to it":       {func(p *probes) { p.dial = noDial }, socket, "--db"},
		"nobody listens":     {func(p *probes) { p.listen = noListen }, probes.checkLoopback, "127.0.0.1"},
		"a firewall":         {func(p *probes) { p.dial = noDial }, probes.checkLoopback, "firewall"},
		"no peer":            {func(p *probes) { p.host = func(p2p.Config) (*p2p.Host, error) { return nil, denied } }, peers, "firewall"},
		"no second peer": {func(p *probes) {
			p.host = func(c p2p.Config) (*p2p.Host, error) {
				if hosts++; hosts == 2 {
					return nil, denied
				}
				return p2p.New(c)
			}
		}, peers, "limits"},
	} {
		p := thisHost()
		c.change(&p)
		if f := c.check(p); f.State != FindingProblem || f.Found != denied.Error() || !strings.Contains(f.Mend, c.mend) {
			t.Errorf("%s: %+v", name, f)
		}
	}
	// Peers of two jobs never meet: the check ends with ctx, if not before.
	p := thisHost()
	ctx, cancel := context.WithCancel(t.Context())
	job := byte(0)
	p.host = func(c p2p.Config) (*p2p.Host, error) {
		if job++; job == 2 {
			cancel()
		}
		c.Job[0] = job
		return p2p.New(c)
	}
	if f := p.checkPeers(ctx); f.State != FindingProblem || !strings.Contains(f.Found, "two peers did not meet") {
		t.Errorf("%+v", f)
	}
	cancel()
	for _, at := range []string{writeTemp(t, "file", ""), filepath.Join(dir, "none")} {
		if f := thisHost().checkFolder(at); f.State != FindingProblem || f.Mend == "" {
			t.Errorf("%s: %+v", at, f)
		}
	}
	for _, f := range []Finding{thisHost().checkFolder(dir), thisHost().checkSocket(dir)} {
		if f.State != FindingOK {
			t.Errorf("%+v", f)
		}
	}
	left, err := os.ReadDir(dir)
	check(t, err)
	for _, e := range left {
		if strings.HasPrefix(e.Name(), ".spirt-doctor-") {
			t.Errorf("it leaves %s", e.Name())
		}
	}
}
