package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/events"
)

// Limits of the output of logs.
const (
	maxLogLine  = 64 << 10 // bytes; the rest of a line is left out
	maxLogLines = 100_000  // for -n, which keeps that many in memory
	followEvery = 200 * time.Millisecond
)

func logsCommand(stdout io.Writer) *cobra.Command {
	var peers []int
	var follow, ofEvents, asJSON bool
	last := -1
	c := &cobra.Command{
		Use:   "logs [RUN]",
		Short: "Print what the peers of a run wrote, or its events",
		Long: "Logs prints the logs of the peers of a run folder (default the newest in ./runs), which are\n" +
			"those of their functions too, in the order of time and with the peer's number before each line.\n" +
			"With --events it prints what happened, one line for each event.",
		Example: "  spirt logs\n  spirt logs runs/mine --peer 2 -n 20 -f\n  spirt logs runs/mine --events\n  spirt logs runs/mine --events --json | jq 'select(.event==\"warning\")'",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case asJSON && !ofEvents:
				return usage(errors.New("--json is for --events: the logs of peers are text"))
			case c.Flags().Changed("lines") && (last < 0 || last > maxLogLines):
				return usage(fmt.Errorf("-n %d: take 0 to %d lines", last, maxLogLines))
			}
			dir, err := runOf(args)
			if err != nil {
				return err
			}
			processes, err := spirt.Processes(dir)
			if err != nil {
				return err
			}
			out := &lineWriter{w: bufio.NewWriter(stdout), last: last}
			var source func() error
			if ofEvents {
				tail, err := spirt.EventsOf(dir)
				if err != nil {
					return err
				}
				defer tail.Close()
				source = func() error { return eventLines(c.Context(), tail, peers, asJSON, out) }
			} else {
				logs, err := openLogs(dir, processes, peers)
				if err != nil {
					return err
				}
				defer logs.close()
				source = func() error { return logs.merge(c.Context(), out) }
			}
			return out.pump(c.Context(), source, follow)
		},
	}
	c.Flags().IntSliceVar(&peers, "peer", nil, "only this peer (repeatable)")
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on")
	c.Flags().IntVarP(&last, "lines", "n", last, "only the last so many lines (-1: all)")
	c.Flags().BoolVar(&ofEvents, "events", false, "print the run's events")
	c.Flags().BoolVar(&asJSON, "json", false, "with --events: as they stand in events.jsonl, one JSON object a line")
	return c
}

// lineWriter writes lines, at first only the last ones of those there are.
type lineWriter struct {
	w     *bufio.Writer
	last  int // lines; negative: all
	ring  []string
	next  int  // in the ring
	ended bool // what is there has been read
}

func (l *lineWriter) line(text string) error {
	if l.last < 0 || l.ended {
		if _, err := l.w.WriteString(text); err != nil {
			return err
		}
		return l.w.WriteByte('\n')
	}
	switch {
	case l.last == 0:
	case len(l.ring) < l.last:
		l.ring = append(l.ring, text)
	default:
		l.ring[l.next] = text
		l.next = (l.next + 1) % l.last
	}
	return nil
}

// pump writes what a source has by now, and on request what it has later.
func (l *lineWriter) pump(ctx context.Context, source func() error, follow bool) error {
	err := source()
	l.ended = true
	for _, text := range slices.Concat(l.ring[l.next:], l.ring[:l.next]) {
		if err == nil {
			err = l.line(text)
		}
	}
	l.ring = nil
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for err == nil {
		if err = l.w.Flush(); err != nil || !follow {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err = source()
		}
	}
	return errors.Join(err, l.w.Flush())
}

// eventLines writes the events that a log has by now.
func eventLines(ctx context.Context, tail *events.Tail, peers []int, asJSON bool, out *lineWriter) (err error) {
	terr := tail.EachLine(func(line []byte, e *events.Event) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || len(peers) > 0 && !slices.Contains(peers, e.Peer) {
			return
		}
		if asJSON {
			err = out.line(string(bytes.TrimSpace(line)))
		} else {
			err = out.line(e.Time.Local().Format("15:04:05.000") + " " + clean(eventText(e)))
		}
	})
	return errors.Join(err, terr)
}

// eventText says in words what an event is.
func eventText(e *events.Event) string {
	switch e.Event {
	case "run":
		return "the run was " + e.State
	case "peer":
		text := fmt.Sprintf("peer %d %s", e.Peer, e.State)
		if e.By != 0 { // the whole reason stands in the events
			reason, _, _ := strings.Cut(e.Message, ":")
			if reason != "" {
				reason = " (" + reason + ")"
			}
			return fmt.Sprintf("peer %d: %s%s", e.By, text, reason)
		}
		if e.State == "started" && e.PID != 0 {
			text += fmt.Sprintf(" as process %d", e.PID)
		}
		if e.Message != "" {
			text += ": " + e.Message
		}
		return text
	case "done":
		text := fmt.Sprintf("done (%s) after %d rounds in %.1f s", e.StopReason, e.Rounds, e.Seconds)
		if e.Accuracy != nil {
			text += fmt.Sprintf(", accuracy %.2f %%", 100**e.Accuracy)
		}
		if e.CostUSD != nil {
			text += ", " + e.CostUSD.String()
		}
		return text
	}
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	switch e.Event {
	case "round":
		add("round %d", e.Round)
		if e.Loss != nil {
			add("loss %.4f", *e.Loss)
		}
		if e.Seconds > 0 {
			add("%.3f s", e.Seconds)
		}
		if e.How != "recomputed" && e.How != "" {
			add("%s", e.How)
		}
		if e.Degraded {
			add("degraded")
		}
		if len(e.Members) > 0 {
			add("of peers %s", numbers(e.Members))
		}
	case "validation":
		add("validation of round %d", e.Round)
		if e.Accuracy != nil {
			add("accuracy %.2f %%", 100**e.Accuracy)
		}
		if e.Loss != nil {
			add("loss %.4f", *e.Loss)
		}
	case "invocation":
		i := e.Invocation
		if i == nil {
			break
		}
		add("invocation %s, minibatch %d of round %d", i.Task, i.Minibatch, i.Round)
		if i.Attempt > 1 {
			add("attempt %d", i.Attempt)
		}
		if i.Cold {
			add("cold")
		}
		add("%.0f ms", i.MS)
		if i.Error != "" {
			add("failed: %s", i.Error)
		}
	case "waiting":
		add("waits at %s for peers %s, %.1f s by now", e.Step, numbers(e.Members), e.Seconds)
	case "final":
		add("round %d is final", e.Round)
	case "finished":
		add("finished at round %d (%s)", e.Round, e.StopReason)
	case "roster":
		add("members after round %d: %s", e.Round, numbers(e.Members))
	case "warning":
		add("%s", e.Message)
	default:
		add("%s", e.Event)
		if e.Message != "" {
			add("%s", e.Message)
		}
	}
	text := strings.Join(parts, ", ")
	if e.Peer != 0 {
		return fmt.Sprintf("peer %d: %s", e.Peer, text)
	}
	return text
}

func numbers(list []int) string {
	var b strings.Builder
	for i, n := range list {
		if i == 16 {
			return b.String() + ",…"
		}
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, n)
	}
	return b.String()
}

// peerLogs are the logs of several peers, read in the order of time.
type peerLogs struct {
	logs  []*peerLog
	width int // of the longest number of a peer
}

// peerLog is the log of one peer. A line without a time of its own, as a
// function or a crash writes it, belongs to the one before.
type peerLog struct {
	peer int
	f    *os.File
	r    *bufio.Reader
	part []byte // a line whose end is not written yet
	long bool   // that line is too long: the rest of it is dropped
	line []byte // the next, nil if there is none
	time time.Time
}

func openLogs(dir string, processes []spirt.PeerProcess, peers []int) (*peerLogs, error) {
	l := &peerLogs{}
	for _, p := range processes {
		if len(peers) > 0 && !slices.Contains(peers, p.Peer) {
			continue
		}
		f, err := os.Open(spirt.PeerLog(dir, p.Peer))
		if errors.Is(err, os.ErrNotExist) {
			continue // it has not started, or its operator sends the log elsewhere
		} else if err != nil {
			l.close()
			return nil, fmt.Errorf("opening the log of peer %d: %w", p.Peer, err)
		}
		l.logs = append(l.logs, &peerLog{peer: p.Peer, f: f, r: bufio.NewReaderSize(f, 64<<10)})
		l.width = max(l.width, len(fmt.Sprint(p.Peer)))
	}
	for _, n := range peers {
		if !slices.ContainsFunc(processes, func(p spirt.PeerProcess) bool { return p.Peer == n }) {
			l.close()
			return nil, usage(fmt.Errorf("%s has no peer %d: `spirt status %s` lists its peers", dir, n, dir))
		}
	}
	if len(l.logs) == 0 {
		return nil, fmt.Errorf("no peer of %s has a log: a peer that was started by hand writes to its terminal", dir)
	}
	return l, nil
}

func (l *peerLogs) close() {
	for _, p := range l.logs {
		p.f.Close()
	}
}

// merge writes all lines that are complete by now.
func (l *peerLogs) merge(ctx context.Context, out *lineWriter) error {
	for {
		var first *peerLog
		for _, p := range l.logs {
			if err := p.fill(); err != nil {
				return fmt.Errorf("reading the log of peer %d: %w", p.peer, err)
			}
			if p.line != nil && (first == nil || p.time.Before(first.time)) {
				first = p
			}
		}
		if first == nil {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := out.line(fmt.Sprintf("peer %*d | %s", l.width, first.peer, clean(string(first.line)))); err != nil {
			return err
		}
		first.line = nil
	}
}

// fill reads the next line if there is none.
func (p *peerLog) fill() error {
	for p.line == nil {
		b, err := p.r.ReadSlice('\n')
		if p.long = p.long || len(p.part)+len(b) > maxLogLine; !p.long {
			p.part = append(p.part, b...)
		} else if room := maxLogLine - len(p.part); room > 0 {
			p.part = append(p.part, b[:min(room, len(b))]...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		p.line = bytes.TrimRight(p.part, "\r\n")
		if p.long {
			p.line = append(p.line, "…"...)
		}
		if at, ok := logTime(p.line); ok {
			p.time = at
		}
		p.line, p.part, p.long = append([]byte{}, p.line...), p.part[:0], false
	}
	return nil
}

// logTime returns the time that a line of log/slog begins with.
func logTime(line []byte) (time.Time, bool) {
	rest, ok := bytes.CutPrefix(line, []byte("time="))
	if !ok {
		return time.Time{}, false
	}
	text, _, _ := bytes.Cut(rest, []byte(" "))
	at, err := time.Parse(time.RFC3339Nano, string(text))
	return at, err == nil
}
