// Search in pages that are opened as files, where browsers refuse workers: the worker's script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (message) => {
        const data = structuredClone(message);
        setTimeout(() => {
          const event = new MessageEvent("message", { data });
          this.dispatchEvent(event);
          this.onmessage?.(event);
        });
      };
      this.ready = new Promise((loaded, failed) => {
        const script = inner.document.createElement("script");
        Object.assign(script, { src: url, onload: loaded, onerror: failed });
        inner.document.body.append(script);
      });
    }

    postMessage(message) {
      const data = structuredClone(message);
      this.ready.then(() => {
        const inner = this.frame.contentWindow;
        setTimeout(() => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
      });
    }

    terminate() {
      this.frame.remove();
    }
  };
}
