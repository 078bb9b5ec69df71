package spirt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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
	for _, check := range []string{"network", "database", "training"} {
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
