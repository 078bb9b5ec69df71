package function

import (
	"slices"
	"testing"
	"time"
)

// percentiles reports the median and the 99th percentile in milliseconds.
func percentiles(b *testing.B, times []time.Duration) {
	slices.Sort(times)
	for name, at := range map[string]int{"p50-ms": len(times) / 2, "p99-ms": len(times) * 99 / 100} {
		b.ReportMetric(times[at].Seconds()*1e3, name)
	}
	b.ReportMetric(0, "ns/op") // the mean says less
}

// From Invoke to its return with a warm instance that does nothing: what the platform and aws-lambda-go take.
func BenchmarkWarmInvocation(b *testing.B) {
	p := platform(b, Config{Concurrency: 1})
	payload := event(b, order{Do: "echo", Value: "x"})
	if _, _, err := p.Invoke(b.Context(), payload); err != nil {
		b.Fatal(err)
	}
	var times []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, inv, err := p.Invoke(b.Context(), payload); err != nil || inv.Cold {
			b.Fatalf("%+v, %v", inv, err)
		}
		times = append(times, time.Since(start))
	}
	percentiles(b, times)
}

// The same with the start of the process, here this test binary.
func BenchmarkColdInvocation(b *testing.B) {
	payload := event(b, order{Do: "echo", Value: "x"})
	var times []time.Duration
	for b.Loop() {
		p := platform(b, Config{Concurrency: 1})
		start := time.Now()
		if _, inv, err := p.Invoke(b.Context(), payload); err != nil || !inv.Cold {
			b.Fatalf("%+v, %v", inv, err)
		}
		times = append(times, time.Since(start))
		p.Close()
	}
	percentiles(b, times)
}
