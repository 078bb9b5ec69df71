package gradient

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/function"
)

// build makes the small binary, without debug information, as it is shipped.
func build(b *testing.B) string {
	dir := b.TempDir()
	check(b, os.Chmod(filepath.Dir(dir), 0o755)) // for the users of instances
	exe := filepath.Join(dir, "spirt-function")
	if out, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", exe, "github.com/spirt-ml/spirt/cmd/spirt-function").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	return exe
}

// measure invokes the shipped binary for the gradient of LeNet-5 on n samples.
func measure(b *testing.B, n int, cold bool) {
	p := newPeer(b, "lenet5")
	config := function.Config{Name: "gradient", Command: []string{build(b)}, Env: []string{tokenVariable + "=" + secret}, Concurrency: 1, MemoryMB: 256,
		Isolation: function.Isolation{Sockets: []string{p.socket}}}
	var times, inits []time.Duration
	peak := 0
	invoke := func(platform *function.Platform) {
		check(b, p.db.Accumulator(prefix+"gradient", len(p.params), 1, 1))
		payload, err := json.Marshal(p.gradient(0, n))
		check(b, err)
		start := time.Now()
		_, inv, err := platform.Invoke(b.Context(), payload)
		check(b, err)
		times = append(times, time.Since(start))
		inits = append(inits, inv.Init)
		peak = max(peak, inv.PeakMemoryMB)
		if cold != inv.Cold {
			b.Fatalf("%+v", inv)
		}
	}
	open := func() *function.Platform {
		platform, err := function.New(config)
		check(b, err)
		return platform
	}
	platform := open()
	defer func() { platform.Close() }()
	if !cold {
		cold = true
		invoke(platform)
		cold = false
		times = nil
	}
	for b.Loop() {
		invoke(platform)
		if cold {
			b.StopTimer()
			check(b, platform.Close())
			platform = open()
			b.StartTimer()
		}
	}
	slices.Sort(times)
	slices.Sort(inits)
	b.ReportMetric(times[len(times)/2].Seconds()*1e3, "p50-ms")
	b.ReportMetric(times[len(times)*99/100].Seconds()*1e3, "p99-ms")
	b.ReportMetric(float64(peak), "peak-MB")
	if cold {
		b.ReportMetric(inits[len(inits)/2].Seconds()*1e3, "init-p50-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// From Invoke to its return, with the gradient of one sample: little but the invocation itself.
func BenchmarkWarmGradientInvocation(b *testing.B) { measure(b, 1, false) }

// The same with the start of the process, its connection and the parameters.
func BenchmarkColdGradientInvocation(b *testing.B) { measure(b, 1, true) }

// A whole minibatch, warm.
func BenchmarkWarmMinibatchInvocation(b *testing.B) { measure(b, 64, false) }
