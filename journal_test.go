package spirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/internal/round"
)

// killVariable has the test binary run a peer that ends itself by SIGKILL once
// a step is in its journal for the n-th time: RUN|PEER|STEP|N. Without a step
// it runs to its end.
const killVariable = "SPIRT_TEST_KILL"

// killedPeer is the process of that peer.
func killedPeer(text string) int {
	part := strings.Split(text, "|")
	var n, left int
	fmt.Sscan(part[1], &n)
	fmt.Sscan(part[3], &left)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT)
	defer stop()
	self, _ := os.FindProcess(os.Getpid())
	adopted := 0
	err := RunPeer(ctx, PeerConfig{Run: part[0], Peer: n, Executable: os.Args[0], step: func(e entry) {
		if e.Step == stepAdopt {
			if adopted++; adopted == 3 && part[2] == stepStop {
				self.Signal(syscall.SIGINT)
			}
		}
		if e.Step == part[2] {
			if left--; left == 0 {
				self.Kill()
				select {} // nothing is done after the step
			}
		}
	}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return ExitFailed
	}
	return ExitDone
}

// runKilled runs that peer in a process and returns what it said when it ended,
// and whether it was killed.
func runKilled(t *testing.T, dir string, n int, step string, nth int) (killed bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%d|%s|%d", killVariable, dir, n, step, nth))
	var said bytes.Buffer
	cmd.Stderr = &said
	err := cmd.Run()
	var exited *exec.ExitError
	if errors.As(err, &exited) && exited.ExitCode() < 0 {
		return true
	}
	if err != nil {
		t.Fatalf("killed at %s: %v: %s", step, err, &said)
	}
	return false
}

// A peer that is killed at any step of its journal and started again ends with
// the model that it would have had, and its bill has what it used before.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	job := smallJob(12)
	job.ValidateEvery = 1 // so that no checkpoint waits for a validation, and all are written before the end
	undisturbed := runOf(t, job)
	check(t, RunPeer(t.Context(), alone(undisturbed)))
	_, want := roundsOf(eventsOf(t, undisturbed), 1)
	for _, step := range journalSteps {
		switch step {
		case stepFetch, stepHeld, stepPursue, stepState:
			continue // there are no others: see TestKilledAmongOthers
		}
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			nth := 6
			switch step {
			case stepPersist, stepCheckpoint, stepOnDisk, stepVote, stepFinish, stepModel, stepEnd, stepStop:
				nth = 1
			}
			dir := runOf(t, job)
			if !runKilled(t, dir, 1, step, nth) {
				t.Fatalf("the peer has not taken the step %s %d times", step, nth)
			}
			before, err := readJournal(filepath.Join(peerDir(dir, 1), journalFile), jobID(t, dir))
			check(t, err)
			if before.Step != step {
				t.Errorf("the journal ends with %s", before.Step)
			}
			if runKilled(t, dir, 1, "", 0) {
				t.Fatal("killed again")
			}
			all := eventsOf(t, dir)
			if _, got := roundsOf(all, 1); got != want {
				t.Errorf("the model is %.12s, undisturbed it is %.12s", got, want)
			}
			resumed := false
			for _, e := range all {
				if e.Event == "resume" {
					resumed = true
					if e.Step != step {
						t.Errorf("it goes on from the step %s", e.Step)
					}
				}
			}
			if !resumed {
				t.Error("it does not tell that it goes on")
			}
			// The invocations of both lives are in its books.
			var told bill.Usage
			for _, e := range all {
				if e.Spent != nil {
					told = told.Add(e.Spent.Usage)
				}
			}
			after, err := readJournal(filepath.Join(peerDir(dir, 1), journalFile), jobID(t, dir))
			check(t, err)
			if used := before.Head.Used; used != nil && after.Head.Used.Invocations < used.Invocations {
				t.Errorf("%+v after %+v", after.Head.Used, used)
			}
			if told.Invocations == 0 {
				t.Error("no round was billed")
			}
		})
	}
}

// A validation that is under way when a peer is stopped or killed still stands
// in the records, so that the run ends where it would have ended.
func TestValidationSurvives(t *testing.T) {
	t.Parallel()
	job := smallJob(60)
	job.ValidateEvery, job.Patience, job.MinDelta = 10, 1, 50 // an improvement that there never is
	undisturbed := runOf(t, job)
	check(t, RunPeer(t.Context(), alone(undisturbed)))
	rounds, want := roundsOf(eventsOf(t, undisturbed), 1)
	if len(rounds) != 28 { // the second validation stands in the record of round 28
		t.Fatalf("it ends at round %d", len(rounds))
	}
	for _, at := range []int{9, 10, 11, 13, 15, 17, 18, 21, 25, 27} {
		ends := func(how string, dir string) {
			if rounds, got := roundsOf(eventsOf(t, dir), 1); rounds[len(rounds)-1] != 28 || got != want {
				t.Errorf("%s at round %d: it ends at round %d with the model %.12s, undisturbed at 28 with %.12s", how, at, rounds[len(rounds)-1], got, want)
			}
		}
		t.Run(strconv.Itoa(at), func(t *testing.T) {
			t.Parallel()
			killed := runOf(t, job)
			if !runKilled(t, killed, 1, stepAdopt, at) || runKilled(t, killed, 1, "", 0) {
				t.Fatal("not killed, or twice")
			}
			ends("killed", killed)

			stopped := runOf(t, job)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			c := alone(stopped)
			c.step = func(e entry) {
				if e.Step == stepAdopt && e.Round == uint64(at) {
					stop()
				}
			}
			if err := RunPeer(ctx, c); !errors.Is(err, ErrInterrupted) {
				t.Fatal(err)
			}
			check(t, RunPeer(t.Context(), alone(stopped)))
			ends("stopped", stopped)
		})
	}
}

// A peer that is killed at any step while another trains on reaches the
// other's model when it is started again.
func TestKilledAmongOthers(t *testing.T) {
	t.Parallel()
	for _, step := range journalSteps {
		switch step {
		case stepStop, stepFinish, stepModel, stepEnd:
			continue // as alone
		}
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			job := smallJob(24)
			job.Peers = 2
			dir := runOf(t, job)
			ended := make(chan error, 1)
			go func() { ended <- RunPeer(t.Context(), alone(dir)) }()
			switch step {
			case stepPursue, stepState: // what it does when it comes back
				if !runKilled(t, dir, 2, stepAdopt, 5) {
					t.Fatal("not killed the first time")
				}
				awaitRound(t, dir, 1, 12) // the checkpoint that it has is of round 4
				if !runKilled(t, dir, 2, step, 1) {
					t.Fatalf("the peer has not taken the step %s", step)
				}
			case stepPersist, stepCheckpoint, stepOnDisk, stepVote:
				if !runKilled(t, dir, 2, step, 1) {
					t.Fatalf("the peer has not taken the step %s", step)
				}
			default:
				if !runKilled(t, dir, 2, step, 6) {
					t.Fatalf("the peer has not taken the step %s", step)
				}
			}
			if runKilled(t, dir, 2, "", 0) {
				t.Fatal("killed again")
			}
			check(t, <-ended)
			models := map[string]bool{}
			for _, e := range eventsOf(t, dir) {
				if e.Event == "finished" {
					models[e.Model] = true
				}
			}
			if len(models) != 1 {
				t.Errorf("the peers ended with %d models", len(models))
			}
		})
	}
}

// awaitRound waits until a peer has finished a round.
func awaitRound(t *testing.T, dir string, peer int, want uint64) {
	t.Helper()
	tick := time.NewTicker(pollEvents)
	defer tick.Stop()
	for range tick.C {
		if rounds, _ := roundsOf(eventsOf(t, dir), peer); len(rounds) > 0 && rounds[len(rounds)-1] >= want {
			return
		}
		if t.Context().Err() != nil {
			t.Fatal(t.Context().Err())
		}
	}
}

func jobID(t testing.TB, dir string) string {
	t.Helper()
	rosters, err := openRosters(dir)
	check(t, err)
	return rosters.genesis.ID().String()
}

// What is torn or damaged in a journal did not happen; what stands before it
// counts.
func TestJournalDamage(t *testing.T) {
	dir := t.TempDir()
	job := round.Hash{1}.String()
	j := openJournal(dir, job, past{}, func(err error) { t.Error(err) })
	record := round.Record{Slot: 3, Height: 2, Set: []round.Entry{{Peer: 0}}}
	j.note(entry{Step: stepAdopt, Slot: 3, Round: 2, Record: &record, Used: &bill.Usage{Invocations: 7}, Elapsed: 12})
	j.note(entry{Step: stepCompute, Slot: 4, Round: 3})
	j.note(entry{Step: stepAverage, Slot: 4, Round: 3, Name: "x"})
	check(t, j.close())
	path := filepath.Join(dir, journalFile)
	text, err := os.ReadFile(path)
	check(t, err)
	read := func(b []byte) past {
		p, err := parseJournal(bytes.NewReader(b), job)
		if err != nil && len(b) > len(journalMagic)+len(job) {
			t.Errorf("%v", err)
		}
		return p
	}
	if p := read(text); p.Step != stepAverage || p.Name != "x" || p.Entries != 3 || p.Head.Record == nil || p.Head.Record.ID() != record.ID() || p.Head.Used.Invocations != 7 || p.Head.Elapsed != 12 {
		t.Errorf("%+v", p)
	}
	first := len(journalMagic) + len(job) + 1
	lines := bytes.SplitAfter(text[first:], []byte{'\n'})
	for cut := first; cut < len(text); cut++ {
		whole := 0
		for n, at := 0, first; n < len(lines)-1; n++ {
			if at += len(lines[n]); at <= cut {
				whole++
			}
		}
		if p := read(text[:cut]); p.Entries != whole {
			t.Fatalf("%d bytes of %d: %d entries, want %d", cut, len(text), p.Entries, whole)
		}
		bad := bytes.Clone(text)
		bad[cut] ^= 4
		if p := read(bad); p.Entries > whole {
			t.Fatalf("byte %d changed: %d entries, want at most %d", cut, p.Entries, whole)
		}
	}
	if _, err := parseJournal(bytes.NewReader(text), round.Hash{2}.String()); err == nil {
		t.Error("a journal of another job was read")
	}
	// Begun anew it has its head still.
	before, err := readJournal(path, job)
	check(t, err)
	check(t, openJournal(dir, job, before, nil).close())
	if p, err := readJournal(path, job); err != nil || p.Entries != 1 || p.Head.Used.Invocations != 7 {
		t.Errorf("%+v, %v", p, err)
	}
}

// A journal that cannot be written is told of once, and ends nothing.
// Where nothing has been final for very long the links no longer fit; the bill
// still does.
func TestJournalLong(t *testing.T) {
	dir, job := t.TempDir(), round.Hash{1}.String()
	j := openJournal(dir, job, past{}, func(err error) { t.Error(err) })
	record := round.Record{Slot: 3, Height: 2, Set: []round.Entry{{Peer: 0}}}
	j.note(entry{Step: stepAdopt, Round: 2, Record: &record, Used: &bill.Usage{Invocations: 7}, Elapsed: 12})
	j.note(entry{Step: stepAdopt, Round: 3, Record: &record, Links: make([]round.Checkpoint, 7000), Used: &bill.Usage{Invocations: 8}, Elapsed: 13})
	j.note(entry{Step: stepCompute, Round: 4})
	for _, rotated := range []bool{false, true} {
		if rotated {
			j.rotate()
		}
		p, err := readJournal(filepath.Join(dir, journalFile), job)
		if check(t, err); p.Entries == 0 || p.Head.Used == nil || p.Head.Used.Invocations != 8 || p.Head.Elapsed != 13 || p.Head.Record != nil && p.Head.Round != 2 {
			t.Errorf("rotated %t: %+v", rotated, p)
		}
	}
	check(t, j.close())
}

func TestJournalWithoutDisk(t *testing.T) {
	told := 0
	j := openJournal(filepath.Join(t.TempDir(), "none"), "job", past{}, func(error) { told++ })
	for range 3 {
		j.note(entry{Step: stepCompute})
		j.rotate()
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	check(t, j.close())
}

func FuzzJournal(f *testing.F) {
	good, err := appendEntry([]byte(journalMagic+"job\n"), entry{Step: stepAdopt, Round: 2, Record: &round.Record{Height: 2}})
	check(f, err)
	f.Add(good)
	f.Add([]byte(journalMagic + "job\n00000000 {}\n"))
	f.Add([]byte(journalMagic + "job"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parseJournal(bytes.NewReader(b), "job")
		if err == nil && p.Entries > 0 && p.Step == "" {
			t.Errorf("%d entries without a step", p.Entries)
		}
	})
}

// BenchmarkJournal is what noting a step costs a peer.
func BenchmarkJournal(b *testing.B) {
	j := openJournal(b.TempDir(), "job", past{}, func(err error) { b.Error(err) })
	defer j.close()
	for b.Loop() {
		j.note(entry{Step: stepFetch, Slot: 4, Round: 3, Name: strings.Repeat("ab", 32)})
	}
}

// A run that cannot be resumed in full leaves the peers that run alone.
func TestFailedResumeKillsNobody(t *testing.T) {
	t.Parallel()
	job := smallJob(100000)
	job.Peers = 2
	dir := runOf(t, job)
	job, _, err := loadJob(dir)
	check(t, err)
	_, data, err := job.open()
	check(t, err)
	r := &run{dir: dir, job: job, data: data, prices: bill.Default(), started: time.Now(), peers: make([]child, 2)}
	check(t, r.record("interrupted", nil))
	check(t, os.MkdirAll(filepath.Join(peerDir(dir, 2), logFile), 0o755)) // no log can be opened there
	check(t, os.WriteFile(filepath.Join(dir, eventsFile), nil, 0o644))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s|1||0", killVariable, dir))
	check(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	awaitRound(t, dir, 1, 1)
	if _, err := Resume(t.Context(), TrainConfig{Dir: dir, Executable: os.Args[0]}); err == nil || !strings.Contains(err.Error(), logFile) {
		t.Fatalf("error %v", err)
	}
	rounds, _ := roundsOf(eventsOf(t, dir), 1)
	awaitRound(t, dir, 1, rounds[len(rounds)-1]+3)
}
