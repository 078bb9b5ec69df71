package function

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"time"
)

// Invocation is the meter of one attempt.
type Invocation struct {
	Function     string
	RequestID    string // the same for all attempts of one Invoke
	Attempt      int    // from 1
	Instance     int    // process id; 0 where none came to be
	Cold         bool   // a process was started for it
	Start        time.Time
	Queue        time.Duration // waiting for a free instance
	Init         time.Duration // cold only: from the start of the process to its first poll
	Duration     time.Duration // from handing over the event to having the result
	Billed       time.Duration // Init + Duration, rounded up to the millisecond
	MemoryMB     int           // what was asked for, and is paid
	PeakMemoryMB int           // most resident memory the instance has had so far; 0 where the system does not tell
	Error        string        // type of the failure; empty: none
	Label        any           // what the caller said of it by Label; nil: nothing
}

type labelKey struct{}

// Label returns a context whose invocations carry a label, for whoever reads their meters.
func Label(ctx context.Context, label any) context.Context {
	return context.WithValue(ctx, labelKey{}, label)
}

// GBSeconds is what the attempt costs in memory times time, as Lambda reckons it.
func (i Invocation) GBSeconds() float64 { return i.Billed.Seconds() * float64(i.MemoryMB) / 1024 }

// abandoned is the record a caller gets who did not wait for the end.
func (i Invocation) abandoned() Invocation {
	i.Error = "Abandoned"
	return i
}

// Stats sums up a platform since it was made.
type Stats struct {
	Invocations  uint64 // attempts that have ended
	Cold         uint64 // of these, with a process started for them
	Errors       uint64 // of these, failed in any way
	Timeouts     uint64 // of these, by timeout
	Crashes      uint64 // of these, by the end of their instance
	MemoryKills  uint64 // of these, by the memory limit
	Retries      uint64 // attempts that followed a failed one
	Throttled    uint64 // calls of the Invoke API refused with status 429
	Refused      uint64 // connections of instances to their Runtime API beyond the few they may have
	Billed       time.Duration
	GBSeconds    float64
	PeakMemoryMB int // of any instance
	Instances    int // alive now
	Idle         int // of these, waiting for work
	Waiting      int // callers that wait for an instance
}

// Stats returns the sums and the present state.
func (p *Platform) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Instances, s.Idle, s.Waiting = len(p.all), len(p.idle), len(p.waiters)
	return s
}

func (p *Platform) count(f func(*Stats)) {
	p.mu.Lock()
	f(&p.stats)
	p.mu.Unlock()
}

// meter fills in what follows from the rest of an attempt's record, adds it to the sums and tells whoever listens.
func (p *Platform) meter(inv *Invocation, err error) {
	if total := inv.Init + inv.Duration; total > 0 {
		inv.Billed = (total + time.Millisecond - 1).Truncate(time.Millisecond)
	}
	if failed, ok := err.(*FunctionError); ok {
		inv.Error = failed.Type
	} else if err != nil {
		inv.Error = "Closed"
	}
	p.count(func(s *Stats) {
		s.Invocations++
		if inv.Cold {
			s.Cold++
		}
		if inv.Error != "" {
			s.Errors++
		}
		switch inv.Error {
		case TypeTimeout:
			s.Timeouts++
		case TypeExit:
			s.Crashes++
		case TypeMemory:
			s.MemoryKills++
		}
		s.Billed += inv.Billed
		s.GBSeconds += inv.GBSeconds()
		s.PeakMemoryMB = max(s.PeakMemoryMB, inv.PeakMemoryMB)
	})
	if p.cfg.OnInvocation != nil {
		p.cfg.OnInvocation(*inv)
	}
}

// newRequestID makes a random UUID (version 4).
func newRequestID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// traceID makes an X-Ray trace header of a request id; nothing is traced, but runtimes expect one.
func traceID(now time.Time, request string) string {
	hex := make([]byte, 0, 32)
	for i := range len(request) {
		if request[i] != '-' {
			hex = append(hex, request[i])
		}
	}
	return fmt.Sprintf("Root=1-%08x-%s;Parent=%s;Sampled=0", uint32(now.Unix()), hex[:24], hex[16:])
}

// region is where the function believes to be: what its environment says, else Lambda's first region.
func (c Config) region() string {
	region := "us-east-1"
	for _, kv := range c.Env {
		if value, ok := strings.CutPrefix(kv, "AWS_REGION="); ok {
			region = value
		}
	}
	return region
}

func (c Config) arn() string {
	return "arn:aws:lambda:" + c.region() + ":" + account + ":function:" + c.Name
}

// account is the AWS account that functions believe to be in.
const account = "000000000000"

// inherited are the variables of this process that instances get too. None of them can hold a secret of the peer.
var inherited = []string{
	"PATH", "HOME", "TMPDIR", "USER", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
	"SYSTEMROOT", "SYSTEMDRIVE", "TEMP", "TMP", "USERPROFILE", "LOCALAPPDATA", "PATHEXT", "COMSPEC", // Windows
}

// environ is the environment of an instance whose Runtime API is at address.
func (c Config) environ(address, stream string) []string {
	var env []string
	for _, key := range inherited {
		if value, ok := os.LookupEnv(key); ok {
			env = append(env, key+"="+value)
		}
	}
	root := c.Dir
	if root == "" {
		root, _ = os.Getwd()
	}
	env = append(env,
		"AWS_LAMBDA_FUNCTION_NAME="+c.Name,
		"AWS_LAMBDA_FUNCTION_VERSION=$LATEST",
		fmt.Sprintf("AWS_LAMBDA_FUNCTION_MEMORY_SIZE=%d", c.MemoryMB),
		"AWS_LAMBDA_INITIALIZATION_TYPE=on-demand",
		"AWS_LAMBDA_LOG_GROUP_NAME=/aws/lambda/"+c.Name,
		"AWS_LAMBDA_LOG_STREAM_NAME="+stream,
		"AWS_REGION="+c.region(),
		"AWS_DEFAULT_REGION="+c.region(),
		"LAMBDA_TASK_ROOT="+root,
		"_HANDLER=bootstrap",
		"TZ=:UTC",
		"GOMAXPROCS=1",
		fmt.Sprintf("GOMEMLIMIT=%dMiB", max(1, c.MemoryMB*9/10)),
	)
	env = append(env, c.Env...)
	// Last, so that no entry of Config.Env sends the instance to another platform.
	return append(env, "AWS_LAMBDA_RUNTIME_API="+address)
}
