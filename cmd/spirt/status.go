package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
)

// runOf returns the run folder that a command is about: its argument, or the
// newest.
func runOf(args []string) (string, error) {
	if len(args) > 0 {
		return args[0], nil
	}
	return spirt.LatestRun("runs")
}

func statusCommand(stdout io.Writer) *cobra.Command {
	var asJSON, watch, plainLines bool
	c := &cobra.Command{
		Use:   "status [RUN]",
		Short: "Tell how a run is, also if nobody watches it",
		Long: "Status finds the peers of a run folder (default the newest in ./runs) by their locks, whoever\n" +
			"started them, and tells what the events say: rounds, loss, accuracy, cost, peers, last faults,\n" +
			"and how it goes on if it can be resumed.\n\n" +
			"It exits with 0 if the run is going on or done, with 1 if it failed, was interrupted, or is dead:\n" +
			"its peers ended without having finished.",
		Example: "  spirt status\n  spirt status runs/mine --watch\n  spirt status runs/mine --json | jq .state",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			dir, err := runOf(args)
			if err != nil {
				return err
			}
			if asJSON && watch {
				return usage(errors.New("--watch shows pictures: events for programs are in events.jsonl, see `spirt logs --events --json -f`"))
			}
			s, err := spirt.StatusOf(dir)
			if err != nil {
				return err
			}
			switch {
			case watch:
				err = watchRun(c.Context(), stdout, s, plainLines)
			case asJSON:
				e := json.NewEncoder(stdout)
				e.SetIndent("", "  ")
				err = e.Encode(reportOf(s))
			default:
				_, err = io.WriteString(stdout, statusPicture(stdout, s))
			}
			if err != nil {
				return err
			}
			return verdict(s)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object")
	c.Flags().BoolVar(&watch, "watch", false, "follow the run until it ends")
	c.Flags().BoolVar(&plainLines, "plain", false, "with --watch: show lines, not a picture, also on a terminal")
	return c
}

// verdict is the error that a run ends the command with.
func verdict(s *spirt.RunStatus) error {
	switch s.State {
	case "running", "done":
		return nil
	case "dead":
		return fmt.Errorf("the run is dead: no peer runs, and not all have finished; go on with: %s", s.Resume)
	case "failed":
		return fmt.Errorf("the run failed: `spirt logs %s` has what its peers wrote; go on with: %s", s.Dir, s.Resume)
	}
	return fmt.Errorf("the run was %s; go on with: %s", s.State, s.Resume)
}

// statusPicture draws a run once, with all its peers.
func statusPicture(w io.Writer, s *spirt.RunStatus) string {
	f := frame{job: s.Job, dir: s.Dir, width: 100, height: len(s.View.Peers) + 34, state: s.State}
	if file, ok := w.(*os.File); ok && isTerminal(w) {
		f.colour = os.Getenv("NO_COLOR") == ""
		if width, _, err := term.GetSize(int(file.Fd())); err == nil && width > 0 {
			f.width = width
		}
	}
	var b strings.Builder
	b.WriteString(f.render(s.View, time.Now()))
	b.WriteString("\n " + clean(processes(s)) + "\n")
	if s.Resume != "" && s.State == "running" {
		b.WriteString(" start the missing peer again with: " + clean(s.Resume) + "\n")
	} else if s.Resume != "" {
		b.WriteString(" go on with: " + clean(s.Resume) + "\n")
	}
	return b.String()
}

// processes says what runs.
func processes(s *spirt.RunStatus) string {
	var parts []string
	for _, p := range s.Peers {
		if p.Running {
			parts = append(parts, fmt.Sprintf("%d (%d)", p.Peer, p.PID))
		}
	}
	text := "no peer runs"
	if len(parts) > 0 {
		text = "peers that run, with process: " + strings.Join(parts, ", ")
	}
	if s.Starter != 0 {
		return text + fmt.Sprintf("; watched by process %d", s.Starter)
	}
	return text
}

// watchRun shows a run until it has ended, or ctx is cancelled.
func watchRun(ctx context.Context, w io.Writer, s *spirt.RunStatus, plainLines bool) error {
	tail, err := spirt.EventsOf(s.Dir)
	if err != nil {
		return err
	}
	defer tail.Close()
	p := &progress{w: w, job: s.Job, dir: s.Dir, plain: plainLines}
	if err := tail.Each(p.view.Add); err != nil { // what was before
		return err
	}
	s.View = &p.view
	look := func() error {
		if err := s.Look(); err != nil {
			return err
		}
		// After the processes: one that is not there now has told all it will.
		if err := tail.Each(func(e *events.Event) { p.event(*e) }); err != nil {
			return err
		}
		p.change(func(f *frame) {
			s.Judge()
			f.state = s.State
		})
		return nil
	}
	p.start()
	defer p.close()
	tick := time.NewTicker(redrawEvery)
	defer tick.Stop()
	for {
		if err := look(); err != nil {
			return err
		}
		if s.State != "running" {
			if p.live == nil {
				p.say("%s", s.State)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return nil // only the watching is over
		case <-tick.C:
		}
	}
}

// statusReport is what `spirt status --json` writes.
type statusReport struct {
	Run        string         `json:"run"`
	State      string         `json:"state"`
	Round      uint64         `json:"round"`
	Rounds     int            `json:"rounds"`
	Loss       *float64       `json:"loss,omitempty"`
	Accuracy   *float64       `json:"accuracy,omitempty"`
	Seconds    float64        `json:"seconds"`
	Left       float64        `json:"seconds_left,omitempty"`
	PerSecond  float64        `json:"samples_per_second"`
	CostUSD    bill.Money     `json:"cost_usd"`
	StopReason string         `json:"stop_reason,omitempty"`
	Starter    int            `json:"starter,omitempty"` // process that watches the peers
	Resume     string         `json:"resume,omitempty"`
	Peers      []peerReport   `json:"peers"`
	Faults     []events.Fault `json:"faults"` // the last ten
}

type peerReport struct {
	spirt.PeerProcess
	State     string           `json:"state"`
	Round     uint64           `json:"round"`
	Model     string           `json:"model,omitempty"`
	Instances int              `json:"instances"`
	Functions events.Functions `json:"functions"`
	Sent      int64            `json:"bytes_sent"`
	Received  int64            `json:"bytes_received"`
	Step      string           `json:"step,omitempty"`        // at which it has been waiting
	Waiting   []int            `json:"waiting_for,omitempty"` // for these peers
}

func reportOf(s *spirt.RunStatus) statusReport {
	v := s.View
	r := statusReport{
		Run: s.Dir, State: s.State, Round: v.Round, Rounds: s.Job.Rounds, Seconds: v.Elapsed().Seconds(), PerSecond: v.SamplesPerSecond(),
		CostUSD: v.Spent, Starter: s.Starter, Resume: s.Resume, Peers: []peerReport{}, Faults: v.Faults[max(0, len(v.Faults)-10):],
	}
	if _, loss, ok := v.Loss.Last(); ok {
		r.Loss = &loss
	}
	if _, accuracy, ok := v.Accuracy.Last(); ok {
		r.Accuracy = &accuracy
	}
	if s.State == "running" {
		r.Left = v.Left(uint64(s.Job.Rounds)).Seconds()
	}
	if v.Done != nil {
		r.StopReason = v.Done.StopReason
		if v.Done.CostUSD != nil {
			r.CostUSD = *v.Done.CostUSD
		}
	}
	if r.Faults == nil {
		r.Faults = []events.Fault{}
	}
	for _, p := range s.Peers {
		one := peerReport{PeerProcess: p, State: "unknown"}
		if of := v.Peer(p.Peer); of != nil {
			one.State, one.Round, one.Model, one.Functions = of.State, of.Round, of.Model, of.Functions
			one.Sent, one.Received = sum(of.Out), sum(of.In)
			if p.Running {
				one.Instances = of.Instances
			}
			if of.Waiting != nil {
				one.Step, one.Waiting = of.Waiting.Step, of.Waiting.Members
			}
		}
		r.Peers = append(r.Peers, one)
	}
	return r
}

func stopCommand(stdout io.Writer) *cobra.Command {
	var cfg spirt.StopConfig
	var asJSON bool
	c := &cobra.Command{
		Use:   "stop [RUN]",
		Short: "Stop the peers of a run",
		Long: "Stop asks the peers of a run folder (default the newest in ./runs) that run on this machine to\n" +
			"stop, whoever started them. They leave a checkpoint, from which the run can be resumed. Those\n" +
			"that take longer than --timeout are killed. Only a process that holds a peer's lock is signalled.\n\n" +
			"It exits with 0 if all are gone. On Windows, where a process cannot be asked, they are ended.",
		Example: "  spirt stop\n  spirt stop runs/mine --peer 3\n  spirt stop runs/mine --now",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			dir, err := runOf(args)
			if err != nil {
				return err
			}
			if f := c.Flags().Lookup("timeout"); f.Changed && cfg.Timeout <= 0 {
				return usage(fmt.Errorf("--timeout %v is not positive: take a time such as 15s, or --now", cfg.Timeout))
			}
			stopped, err := spirt.StopPeers(c.Context(), dir, cfg)
			if asJSON && stopped != nil {
				if werr := json.NewEncoder(stdout).Encode(stopped); err == nil {
					err = werr
				}
				return err
			}
			if _, werr := io.WriteString(stdout, stopText(dir, stopped, cfg)); err == nil {
				err = werr
			}
			return err
		},
	}
	c.Flags().IntSliceVar(&cfg.Peers, "peer", nil, "stop only this peer (repeatable)")
	c.Flags().DurationVar(&cfg.Timeout, "timeout", 15*time.Second, "kill peers that take longer")
	c.Flags().BoolVar(&cfg.Now, "now", false, "kill at once, without a checkpoint")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON array")
	return c
}

// stopText says what became of peers.
func stopText(dir string, peers []spirt.StoppedPeer, cfg spirt.StopConfig) string {
	var b strings.Builder
	ran := 0
	for _, p := range peers {
		text := ""
		switch p.State {
		case "absent":
			if len(cfg.Peers) > 0 {
				fmt.Fprintf(&b, "peer %d does not run\n", p.Peer)
			}
			continue
		case "stopped":
			text = "stopped"
		case "killed":
			text = "killed"
			if !cfg.Now {
				text = fmt.Sprintf("killed: it had not stopped within %v", cfg.Timeout)
			}
		default:
			text = "still runs"
			if p.Message != "" {
				text += ": " + p.Message
			}
		}
		ran++
		fmt.Fprintf(&b, "peer %d (process %d) %s\n", p.Peer, p.PID, clean(text))
	}
	if ran == 0 && len(cfg.Peers) == 0 {
		fmt.Fprintf(&b, "no peer of %s runs on this machine\n", clean(dir))
	}
	return b.String()
}
