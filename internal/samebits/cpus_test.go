//go:build integration && linux && amd64

package samebits

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestModelOfFixedGradients holds on arm64, which QEMU stands in for, and on
// the newer CPUs of this kind for which Go fuses operations as it does there,
// with assembly and without. The test itself runs on the oldest, GOAMD64=v1.
func TestModelOnOtherCPUs(t *testing.T) {
	for _, v := range []struct {
		name string
		env  []string
		tags string
		run  string // what runs the program; empty: this machine
	}{
		{name: "amd64-v3", env: []string{"GOARCH=amd64", "GOAMD64=v3"}},
		{name: "amd64-v3-noasm", env: []string{"GOARCH=amd64", "GOAMD64=v3"}, tags: "noasm"},
		{name: "arm64", env: []string{"GOARCH=arm64"}, run: "qemu-aarch64-static"},
	} {
		t.Run(v.name, func(t *testing.T) {
			exe := filepath.Join(t.TempDir(), "samebits.test")
			build := exec.Command("go", "test", "-c", "-tags", v.tags, "-o", exe, ".")
			build.Env = append(append(os.Environ(), "CGO_ENABLED=0"), v.env...)
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			args := []string{exe, "-test.v", "-test.run", "^TestModelOfFixedGradients$"}
			if v.run != "" {
				args = append([]string{v.run}, args...)
			}
			out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
			if err != nil || strings.Count(string(out), "--- PASS") < 7 {
				t.Errorf("%v: the test needs Debian's qemu-user-static\n%s", err, out)
			}
		})
	}
}
