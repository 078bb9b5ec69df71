//go:build integration

package dashboard

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/spirt-ml/spirt/events"
)

// browser opens a page in headless Chromium and collects what it asks for and
// complains of.
func browser(t *testing.T) (ctx context.Context, asked, said func() []string) {
	t.Helper()
	flags := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true), chromedp.WindowSize(1280, 900), chromedp.WSURLReadTimeout(2*time.Minute))
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), flags...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	ctx, cancel = context.WithTimeout(ctx, 3*time.Minute)
	t.Cleanup(cancel)
	var mu sync.Mutex
	var urls, errors []string
	chromedp.ListenTarget(ctx, func(e any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := e.(type) {
		case *network.EventRequestWillBeSent:
			urls = append(urls, e.Request.URL)
		case *runtime.EventExceptionThrown:
			errors = append(errors, e.ExceptionDetails.Error())
		case *log.EventEntryAdded:
			if e.Entry.Level == log.LevelError {
				errors = append(errors, e.Entry.Text+" "+e.Entry.URL)
			}
		}
	})
	copyOf := func(list *[]string) func() []string {
		return func() []string {
			mu.Lock()
			defer mu.Unlock()
			return append([]string{}, *list...)
		}
	}
	return ctx, copyOf(&urls), copyOf(&errors)
}

// inked says whether a canvas has anything drawn on it.
const inked = `(() => { const c = document.querySelector(%q); if (!c || !c.width) return false;
	return c.getContext("2d").getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 === 3 && v > 0); })()`

func TestBrowser(t *testing.T) {
	dir := synthetic(t, "long", 10_000, 4)
	_, h := serve(t, Config{Runs: []string{dir}})
	ctx, asked, said := browser(t)
	has := func(js string) chromedp.Action {
		return chromedp.Poll(js, nil, chromedp.WithPollingInterval(50*time.Millisecond), chromedp.WithPollingTimeout(time.Minute))
	}
	ink := func(selector string) chromedp.Action {
		return has(strings.Replace(inked, "%q", `"`+selector+`"`, 1))
	}
	var paint, longest float64
	var title, fault string
	err := chromedp.Run(ctx, network.Enable(), log.Enable(),
		chromedp.Navigate(h.URL+"/"),
		has(`document.querySelector("#tiles dd")?.textContent.startsWith("10,000")`),
		ink("#loss canvas"), ink("#accuracy canvas"), ink("#timeline"),
		has(`document.querySelectorAll("#peers tbody tr").length === 4 && document.querySelectorAll("#graph circle").length === 4`),
		chromedp.Evaluate(`performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? -1`, &paint),
		chromedp.Text("#faults li", &fault, chromedp.ByQuery),
	)
	if err != nil {
		t.Fatalf("%v; the page said %q", err, said())
	}
	if paint < 0 || paint > 10_000 {
		t.Errorf("first paint after %v ms", paint)
	}
	t.Logf("first contentful paint after %.0f ms", paint)
	if !strings.Contains(fault, nasty) {
		t.Errorf("the fault is shown as %q", fault)
	}
	// Live: a thousand updates more, and no frame that takes long.
	err = chromedp.Run(ctx, chromedp.Evaluate(`window.longest = 0; new PerformanceObserver((l) => { for (const e of l.getEntries()) window.longest = Math.max(window.longest, e.duration); }).observe({type: "longtask"}); true`, nil))
	if err != nil {
		t.Fatal(err)
	}
	for r := 10_001; r <= 10_020; r++ {
		for p := 1; p <= 4; p++ {
			add(t, dir, line(t, roundOf(p, r, 4)))
		}
	}
	err = chromedp.Run(ctx, has(`document.querySelector("#tiles dd")?.textContent.startsWith("10,020")`))
	if err != nil {
		t.Fatalf("%v; the page said %q", err, said())
	}
	add(t, dir, line(t, events.Event{Event: "peer", Peer: 3, State: "crashed", Message: "signal: killed"}))
	err = chromedp.Run(ctx,
		has(`document.querySelector("#peers tbody tr:nth-child(3) td:nth-child(2)").textContent === "crashed" && document.querySelectorAll("#graph circle.bad").length === 1`),
		chromedp.Click("input[value=time]", chromedp.ByQuery), ink("#loss canvas"),
		chromedp.Click("#log", chromedp.ByQuery), ink("#loss canvas"),
		chromedp.Evaluate(`window.longest`, &longest), chromedp.Title(&title),
	)
	if err != nil {
		t.Fatalf("%v; the page said %q", err, said())
	}
	t.Logf("longest task with 10,000 rounds: %.0f ms", longest)
	if !strings.HasPrefix(title, "long") {
		t.Errorf("the title is %q", title)
	}
	if errors := said(); len(errors) > 0 {
		t.Errorf("the page said %q", errors)
	}
	for _, u := range asked() {
		if !strings.HasPrefix(u, h.URL+"/") && !strings.HasPrefix(u, "data:") {
			t.Errorf("the page asked for %s", u)
		}
	}
}

// Several runs lie over each other, and who does not know the token sees none.
func TestBrowserRunsAndToken(t *testing.T) {
	_, h := serve(t, Config{Token: token, Runs: []string{withInfo(t, synthetic(t, "one", 100, 2)), withInfo(t, synthetic(t, "two", 50, 2))}})
	ctx, _, said := browser(t)
	var legend string
	err := chromedp.Run(ctx,
		chromedp.Navigate(h.URL+"/"),
		chromedp.SendKeys("#token", token+"\n", chromedp.ByQuery), chromedp.WaitVisible("#loss .u-series", chromedp.ByQuery),
		chromedp.Poll(`document.querySelectorAll("#loss .u-series").length === 5`, nil, chromedp.WithPollingTimeout(time.Minute)),
		chromedp.Text("#loss .u-legend", &legend, chromedp.ByQuery),
	)
	if err != nil || !strings.Contains(legend, "one: training loss") || !strings.Contains(legend, "two: validation loss") {
		t.Errorf("%v: legend %q; the page said %q", err, legend, said())
	}
}

// withInfo gives a run the record that a real one has.
func withInfo(t *testing.T, dir string) string {
	t.Helper()
	b, err := json.Marshal(map[string]any{"state": "done", "job": map[string]any{"Model": "lenet5", "Rounds": 100}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "run.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestScreenshot shows the page of a real run: SCREENSHOT_RUN=folder
// SCREENSHOT=file.png writes the picture of the docs anew.
func TestScreenshot(t *testing.T) {
	dir, path := os.Getenv("SCREENSHOT_RUN"), os.Getenv("SCREENSHOT")
	if dir == "" {
		dir, path = synthetic(t, "run", 100, 4), filepath.Join(t.TempDir(), "page.png")
	}
	_, h := serve(t, Config{Runs: []string{dir}})
	ctx, _, _ := browser(t)
	var png []byte
	err := chromedp.Run(ctx, chromedp.Navigate(h.URL+"/"), chromedp.Poll(`document.querySelectorAll("#loss canvas").length > 0 && document.querySelector("#tiles dd")`, nil), chromedp.FullScreenshot(&png, 100))
	if err != nil || len(png) < 10_000 {
		t.Fatalf("%d bytes: %v", len(png), err)
	}
	if err := os.WriteFile(path, png, 0o644); err != nil {
		t.Fatal(err)
	}
}
